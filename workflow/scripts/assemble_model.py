"""Put the quantised fc layers into the fine-tuned network."""

from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    network = Network.load(snakemake.input.network)
    apply_layers(network, snakemake.input.layers).save(snakemake.output.network)
