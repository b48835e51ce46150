"""Put the channels between layers into an order that suits quantisation."""

from qcnn_py.channel_order import order_channels
from qcnn_py.config import LayerSettings
from qcnn_py.network import Network
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    settings = {
        name: LayerSettings.from_mapping(chosen)
        for name, chosen in snakemake.params.settings.items()
    }
    network = Network.load(snakemake.input.network)
    order_channels(network, settings).save(snakemake.output.network)
