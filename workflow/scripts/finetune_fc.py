"""Train the fully connected layers on the features of the quantised conv part."""

from qcnn_py.artefacts import save_json
from qcnn_py.config import OptimizerConfig
from qcnn_py.finetuning import Features, finetune_fc
from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers
from qcnn_py.workflow import checkpoint_of, reporting

with reporting(snakemake.log[0]), checkpoint_of(snakemake) as checkpoint:
    network = apply_layers(
        Network.load(snakemake.input.network), snakemake.input.layers
    )
    finetuned, history = finetune_fc(
        network,
        Features.load(snakemake.input.features),
        OptimizerConfig.from_mapping(snakemake.params.config),
        snakemake.params.seed,
        snakemake.params.noise,
        checkpoint,
    )
    finetuned.save(snakemake.output.network)
    save_json(snakemake.output.history, history)
