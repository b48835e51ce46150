"""The ONNX project's own test suite, which its package carries, on our importer.

What runs: every case of nodes and small models whose operators all are supported, with
float32 values, and the nine networks with weights that a few nodes make. A case that
is out of scope is listed with the reason; it has to be refused, so that no list is
longer than need be.
"""

import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto
from onnx.backend.test import BackendTest
from onnx.backend.test.loader import load_model_tests
from onnx_backend import EngineBackend

from qcnn_py import ModelFormatError, ShapeError, UnsupportedOperator
from qcnn_py.onnx_operators import OPERATORS

REAL = "OnnxBackendRealModelTest"

OUT_OF_SCOPE = {
    "it mixes the images of a batch": """
        center_crop_pad_crop_and_pad_expanded center_crop_pad_crop_axes_hwc_expanded
        center_crop_pad_crop_expanded center_crop_pad_crop_negative_axes_hwc_expanded
        center_crop_pad_pad_expanded concat_1d_axis_0 concat_1d_axis_negative_1
        concat_2d_axis_0 concat_2d_axis_negative_2 concat_3d_axis_0
        concat_3d_axis_negative_3 flatten_axis0 flatten_axis2 flatten_axis3
        flatten_negative_axis1 flatten_negative_axis2 flatten_negative_axis4 gather_0
        gather_negative_indices gemm_all_attributes gemm_transposeA logsoftmax_axis_0
        operator_chunk operator_index reduce_max_default_axes_keepdim_example
        reduce_max_default_axes_keepdims_random
        reduce_mean_default_axes_keepdims_example
        reduce_mean_default_axes_keepdims_random
        reduce_sum_default_axes_keepdims_example reduce_sum_default_axes_keepdims_random
        reduce_sum_square_default_axes_keepdims_example_expanded
        reduce_sum_square_default_axes_keepdims_random_expanded
        reshape_negative_extended_dims reshape_one_dim reshape_reordered_all_dims slice
        slice_neg_steps softmax_axis_0 split_1d_uneven_split_opset18
        split_equal_parts_1d_opset13 split_equal_parts_1d_opset18
        split_equal_parts_default_axis_opset13 split_equal_parts_default_axis_opset18
        split_variable_parts_1d_opset13 split_variable_parts_1d_opset18
        split_variable_parts_default_axis_opset13
        split_variable_parts_default_axis_opset18 squeeze transpose_all_permutations_2
        transpose_all_permutations_3 transpose_all_permutations_4
        transpose_all_permutations_5 transpose_default unsqueeze_axis_0
    """,
    "three spatial axes": """
        AvgPool3d AvgPool3d_stride AvgPool3d_stride1_pad0_gpu_input Conv3d
        Conv3d_dilated Conv3d_dilated_strided Conv3d_groups Conv3d_no_bias Conv3d_stride
        Conv3d_stride_padding MaxPool3d MaxPool3d_stride MaxPool3d_stride_padding
        averagepool_3d_default
        averagepool_3d_dilations_large_count_include_pad_is_0_ceil_mode_is_False
        averagepool_3d_dilations_large_count_include_pad_is_0_ceil_mode_is_True
        averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_False
        averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_True
        averagepool_3d_dilations_small maxpool_3d_default maxpool_3d_dilations
        maxpool_3d_dilations_use_ref_impl maxpool_3d_dilations_use_ref_impl_large
    """,
    "training mode": """
        batchnorm_epsilon_training_mode batchnorm_example_training_mode training_dropout
        training_dropout_default
    """,
    "empty values": """
        reduce_max_empty_set reduce_sum_empty_set
        reduce_sum_empty_set_non_reduced_axis_zero reduce_sum_square_empty_set_expanded
        reshape_allowzero_reordered rotary_embedding_3d_input_expanded
        rotary_embedding_expanded rotary_embedding_interleaved_expanded
        rotary_embedding_no_position_ids_expanded
        rotary_embedding_no_position_ids_interleaved_expanded slice_start_out_of_bounds
        split_zero_size_splits_opset13 split_zero_size_splits_opset18
    """,
    "a value is repeated": """
        expand_dim_changed expand_dim_unchanged expand_shape_model2 expand_shape_model3
        expand_shape_model4
    """,
    "both operands are computed, or a constant differs between images": """
        causal_conv_with_state_decode_step_expanded
        causal_conv_with_state_with_bias_and_past_state_expanded
        causal_conv_with_state_with_past_state_expanded div div_example
        gemm_default_matrix_bias matmul_1d_1d matmul_1d_3d matmul_3d matmul_4d
        matmul_4d_1d matmul_bcast max_example max_float32 max_two_inputs min_example
        min_float32 min_two_inputs operator_addmm operator_max operator_min
        operator_params prelu_example
        rotary_embedding_no_position_ids_rotary_dim_expanded
        rotary_embedding_with_interleaved_rotary_dim_expanded
        rotary_embedding_with_rotary_dim_expanded swiglu_alpha_expanded swiglu_expanded
    """,
    "more windows with gaps than one node is made of": (
        "MaxPool1d_stride_padding_dilation"
    ),
    "the output is constant": "operator_symbolic_override_nested",
}

REASONS = {
    f"test_{name}": reason
    for reason, names in OUT_OF_SCOPE.items()
    for name in names.split()
}


def _models() -> Iterator[tuple[str, onnx.ModelProto]]:
    for kind in ("node", "pytorch-converted", "pytorch-operator", "simple"):
        for case in load_model_tests(kind=kind):
            if case.model is not None:
                yield case.name, case.model
            else:
                yield case.name, onnx.load(Path(case.model_dir) / "model.onnx")


def _is_ours(model: onnx.ModelProto) -> bool:
    """Whether a case has supported operators only, and float32 values."""
    graph = model.graph
    values = [*graph.input[:1], *graph.output]
    float32 = all(v.type.tensor_type.elem_type == TensorProto.FLOAT for v in values)
    operators = {node.op_type for node in graph.node}
    return float32 and bool(graph.input) and operators <= {*OPERATORS, "Constant"}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the suite from writing to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNX_HOME", str(tmp_path_factory.mktemp("onnx")))
        yield


with warnings.catch_warnings():
    # Some cases of other operators overflow when they are made.
    warnings.simplefilter("ignore")
    OURS = {name for name, model in _models() if _is_ours(model)}
    SUITE: dict[str, type[unittest.TestCase]] = BackendTest(
        EngineBackend, __name__
    ).test_cases

CASES = {
    name.removesuffix("_cpu"): case(name)
    for case in SUITE.values()
    for name in vars(case)
    if name.endswith("_cpu")
}
LIGHT = [name for name, case in CASES.items() if type(case) is SUITE[REAL]]


@pytest.mark.parametrize("name", sorted(OURS - REASONS.keys()))
def test_case(name: str) -> None:
    CASES[name].debug()


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_network(name: str) -> None:
    CASES[name].debug()


def test_light_networks_are_there() -> None:
    assert len(LIGHT) == 9


@pytest.mark.parametrize("name", sorted(REASONS))
def test_refused_case(name: str) -> None:
    with pytest.raises((UnsupportedOperator, ModelFormatError, ShapeError)):
        CASES[name].debug()
    assert name in OURS
