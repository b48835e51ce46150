//! Inference engine for product-quantised convolutional networks.
//!
//! A network's convolution and fully connected weights are stored as codebooks
//! and codes; a layer's response is a sum of look-ups in tables of inner
//! products between the input and the codewords (Wu et al., *Quantized
//! Convolutional Neural Networks for Mobile Devices*, CVPR 2016).
//!
//! # Glossary
//!
//! | here | in the papers | meaning |
//! |---|---|---|
//! | subspace | `M` of them | a run of input channels quantised together |
//! | sub-vector | length `C'` | the weights of one output, kernel position and subspace |
//! | codeword, centroid | `K` per subspace | what a sub-vector is replaced by |
//! | codebooks | `D`, `ctrd` | all codewords, `(M, K, C')` |
//! | codes | `B`, `asmt` | which codeword each sub-vector uses |
//! | table, lut | `InPd` | inner products of an input with all codewords |
//! | response | `T` | what a layer puts out before its activation |
//! | tap | | one kernel position `(ky, kx)` |
//!
//! # Structure
//!
//! [`container`] reads a `.qcnn` file into a checked [`graph::Network`];
//! [`session::Session`] plans it for one ISA (packed weights, kernels, buffers)
//! and runs it in a [`session::Workspace`] without allocating.

pub mod codebooks;
pub mod container;
pub mod error;
pub mod geometry;
pub mod graph;
pub mod isa;
pub mod kernels;
mod memory;
pub mod ops;
pub mod pack;
pub mod precision;
pub mod session;

pub use error::{Error, Result};
pub use graph::{Graph, Network, Tensor, TensorData, Tensors};
pub use isa::Isa;
pub use precision::Precision;
pub use session::{Session, Workspace};
