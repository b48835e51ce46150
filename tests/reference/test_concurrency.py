"""One model used by several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from test_quantized_layers import mixed_network


def test_calls_from_eight_threads_agree(isa):
    network, builder = mixed_network()
    model = network.compile(precision="exact", isa=isa, threads=2)
    # Different batches, so that one thread's scratch must not serve another.
    batches = [builder.images(1 + i % 5) for i in range(64)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(model, batches))
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, wanted)
