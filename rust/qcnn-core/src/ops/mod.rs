//! Operations other than the product-quantised look-ups.
//!
//! Convolutions and fully connected layers are [`crate::kernels::Kernel`]s;
//! the other operations are plain functions and small structs that work on
//! `n` images back to back. Elementwise ones work in place. All are compiled
//! for the session's ISA (see [`crate::isa`]).
//!
//! NaN goes through: every operation gives NaN where any operand of the output
//! is NaN, max-pooling, `relu` and `clip` included (as NumPy and ONNX Runtime do).

pub mod activation;
pub mod conv;
pub mod elementwise;
pub mod fc;
pub mod lrn;
pub mod norm;
pub mod pool;
pub mod quantize;
pub mod rearrange;
pub mod softmax;
pub mod strided;
