"""Draw the parameters of a network that is only timed."""

from qcnn_py.architectures import drawn_network
from qcnn_py.config import LayerSettings
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    settings = {
        name: LayerSettings.from_mapping(layer)
        for name, layer in snakemake.params.layers.items()
    }
    network = drawn_network(
        snakemake.params.architecture, settings, snakemake.params.seed
    )
    network.save(snakemake.output.model)
