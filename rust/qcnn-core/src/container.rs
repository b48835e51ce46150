//! `.qcnn` files: safetensors with the graph as JSON in the metadata.
//!
//! The metadata has one entry, `qcnn`: the JSON object
//! `{"version": 1, "graph": …}`. One entry, because safetensors writes several
//! in random order and the same network has to give the same bytes.
//!
//! Tensors are stored under their own names, float32 as `F32`, with two
//! exceptions. `<node>.codes` and `<node>.signs` are `U8`, the bit stream of
//! [`crate::pack`].
//! `<node>.codebooks` is stored without the padding of the last subspace as
//! `(K, channels)` or `(groups, K, channels)`: row `k` holds codeword `k` of
//! every subspace side by side, so that channel `c` of a sub-vector with code
//! `k` is element `(k, c)`. Its numbers are `F32`, `F16` or `I8`, the last ones
//! with a tensor of scales, `<node>.codebook_scales` ([`crate::codebooks`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::codebooks;
use crate::error::{Error, Result, bail_format};
use crate::graph::{
    CodebookBits, Content, Graph, Layout, Network, PqGeometry, Tensor, TensorData, Tensors,
};
use crate::pack::{SharedBytes, pack, pack_signs, packed_len};

/// Version of the format this crate reads and writes.
pub const FORMAT_VERSION: u32 = 1;

const METADATA_KEY: &str = "qcnn";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    graph: Graph,
}

/// Only the version, to name it even if the rest of the header has changed.
#[derive(Deserialize)]
struct HeaderVersion {
    version: u32,
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io {
        path: path.to_owned(),
        source,
    }
}

/// Read and check a `.qcnn` file.
pub fn read(path: &Path) -> Result<Network> {
    let at_path = io_error(path);
    if !std::fs::metadata(path).map_err(&at_path)?.is_file() {
        bail_format!("{}: not a regular file", path.display());
    }
    let bytes = std::fs::read(path).map_err(&at_path)?;
    from_buffer(&Arc::new(bytes)).map_err(|e| match e {
        Error::Format(m) => Error::Format(format!("{}: {m}", path.display())),
        Error::Shape(m) => Error::Shape(format!("{}: {m}", path.display())),
        other => other,
    })
}

/// Write a `.qcnn` file under a temporary name, then rename it to `path`.
pub fn write(path: &Path, network: &Network) -> Result<()> {
    let at_path = io_error(path);
    let bytes = to_bytes(network)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".qcnn-").suffix(".tmp");
    // Like any new file, not private to the user as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(&at_path)?;
    file.write_all(&bytes).map_err(&at_path)?;
    file.persist(path).map_err(|e| at_path(e.error))?;
    Ok(())
}

/// Parse the bytes of a `.qcnn` file.
pub fn from_bytes(bytes: &[u8]) -> Result<Network> {
    from_buffer(&Arc::new(bytes.to_vec()))
}

/// Parse the bytes of a `.qcnn` file. Codes stay in them; the buffer lives as
/// long as the network.
fn from_buffer(buffer: &Arc<Vec<u8>>) -> Result<Network> {
    let bytes = buffer.as_slice();
    let refused = |e: safetensors::SafeTensorError| {
        Error::Format(format!("not a valid safetensors file: {e}"))
    };
    let (header_len, metadata) = SafeTensors::read_metadata(bytes).map_err(refused)?;
    let Some(header) = metadata
        .metadata()
        .as_ref()
        .and_then(|m| m.get(METADATA_KEY))
    else {
        bail_format!("metadata entry {METADATA_KEY:?} is missing: not a .qcnn file");
    };
    let bad_header =
        |e: serde_json::Error| Error::Format(format!("metadata entry {METADATA_KEY:?}: {e}"));
    let HeaderVersion { version } = serde_json::from_str(header).map_err(bad_header)?;
    if version != FORMAT_VERSION {
        bail_format!("format version is {version}, expected {FORMAT_VERSION}");
    }
    let Header { graph, .. } = serde_json::from_str(header).map_err(bad_header)?;
    let layout = graph.layout()?;
    let stored = SafeTensors::deserialize(bytes).map_err(refused)?;
    let expected = StoredTensor::all_of(&layout);
    let mut found: HashMap<&str, SharedBytes> = HashMap::new();
    for (name, view) in stored.iter() {
        let Some(expected) = expected.get(name) else {
            bail_format!("tensor {name:?} belongs to no node of the graph");
        };
        if view.dtype() != expected.dtype || view.shape() != expected.shape {
            bail_format!(
                "tensor {name:?} is {:?} of shape {:?}, expected {:?} of shape {:?}",
                view.dtype(),
                view.shape(),
                expected.dtype,
                expected.shape
            );
        }
        let Some(info) = metadata.info(name) else {
            bail_format!("tensor {name:?} is missing in the header");
        };
        let start = size_of::<u64>() + header_len;
        let (first, end) = info.data_offsets;
        let bytes = SharedBytes::new(Arc::clone(buffer), start + first..start + end);
        found.insert(name, bytes);
    }
    let mut tensors = Tensors::new();
    for (name, spec) in &layout.tensors {
        // What is missing is named by Network::new, but for what it does not know.
        let Some(bytes) = found.get(name.as_str()) else {
            continue;
        };
        let data = match spec.content {
            Content::Floats => TensorData::F32(floats(bytes)),
            Content::Codes(_) | Content::Signs => TensorData::Packed(bytes.clone()),
            Content::Codebooks { pq, channels } => {
                let name = scales_name(name);
                let scales = match (expected.get(&name), found.get(name.as_str())) {
                    (None, _) => Vec::new(),
                    (Some(_), Some(scales)) => floats(scales),
                    (Some(scales), None) => {
                        bail_format!(
                            "tensor {name:?} is missing, expected shape {:?}",
                            scales.shape
                        )
                    }
                };
                TensorData::F32(codebooks::decode(pq, channels, bytes, &scales))
            }
        };
        let shape = spec.shape.clone();
        tensors.insert(name.clone(), Tensor { shape, data });
    }
    Network::new(graph, tensors)
}

/// The bytes of a `.qcnn` file; the same network always gives the same.
pub fn to_bytes(network: &Network) -> Result<Vec<u8>> {
    let header = Header {
        version: FORMAT_VERSION,
        graph: network.graph().clone(),
    };
    let header = serde_json::to_string(&header).expect("a graph has only string keys");
    let views = StoredTensor::all_of(network.layout())
        .into_iter()
        .map(|(name, stored)| {
            let tensor = &network.tensors()[&stored.source];
            (name, EncodedTensor { stored, tensor })
        });
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), header)]);
    safetensors::serialize(views, Some(metadata))
        .map_err(|e| Error::Format(format!("cannot be written as safetensors: {e}")))
}

/// A tensor of a file.
struct StoredTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Name of the network's tensor that it is made of.
    source: String,
    encoding: Encoding,
}

enum Encoding {
    Floats,
    /// Codes of `bits` bits.
    Codes {
        bits: u32,
    },
    Signs,
    Codebooks {
        pq: PqGeometry,
        channels: usize,
    },
    /// The scales of 8-bit codebooks.
    Scales {
        pq: PqGeometry,
        channels: usize,
    },
}

/// Name of the scales of the codebooks called `codebooks`.
fn scales_name(codebooks: &str) -> String {
    // `<node>.codebooks` has `<node>.codebook_scales`.
    format!(
        "{}_scales",
        codebooks.strip_suffix('s').unwrap_or(codebooks)
    )
}

impl StoredTensor {
    /// All tensors of the file of a network, by name.
    fn all_of(layout: &Layout) -> BTreeMap<String, Self> {
        let mut all = BTreeMap::new();
        for (name, spec) in &layout.tensors {
            let mut add = |name: String, source: &str, dtype, shape, encoding| {
                let stored = Self {
                    dtype,
                    shape,
                    source: source.to_owned(),
                    encoding,
                };
                all.insert(name, stored);
            };
            match spec.content {
                Content::Floats => add(
                    name.clone(),
                    name,
                    Dtype::F32,
                    spec.shape.clone(),
                    Encoding::Floats,
                ),
                Content::Codes(pq) => {
                    let bits = pq.code_bits();
                    let shape = vec![packed_len(spec.shape.iter().product(), bits)];
                    let encoding = Encoding::Codes { bits };
                    add(name.clone(), name, Dtype::U8, shape, encoding);
                }
                Content::Signs => {
                    let shape = vec![packed_len(spec.shape.iter().product(), 1)];
                    add(name.clone(), name, Dtype::U8, shape, Encoding::Signs);
                }
                Content::Codebooks { pq, channels } => {
                    let per_set = |shape: &[usize]| {
                        let sets = (pq.codebook_groups > 1).then_some(pq.codebook_groups);
                        sets.into_iter().chain(shape.iter().copied()).collect()
                    };
                    let dtype = match pq.codebook_bits {
                        CodebookBits::Float32 => Dtype::F32,
                        CodebookBits::Float16 => Dtype::F16,
                        CodebookBits::Int8 => Dtype::I8,
                    };
                    let shape = per_set(&[pq.n_centroids, channels]);
                    let encoding = Encoding::Codebooks { pq, channels };
                    add(name.clone(), name, dtype, shape, encoding);
                    if pq.codebook_bits == CodebookBits::Int8 {
                        let shape = per_set(&[pq.n_subspaces]);
                        let encoding = Encoding::Scales { pq, channels };
                        add(scales_name(name), name, Dtype::F32, shape, encoding);
                    }
                }
            }
        }
        all
    }

    fn encode<'a>(&self, data: &'a TensorData) -> Cow<'a, [u8]> {
        let bytes = |floats: &[f32]| floats.iter().flat_map(|v| v.to_le_bytes()).collect();
        match (&self.encoding, data) {
            (_, TensorData::Packed(packed)) => Cow::Borrowed(packed),
            (&Encoding::Codes { bits }, TensorData::Codes(codes)) => Cow::Owned(pack(codes, bits)),
            (&Encoding::Signs, TensorData::Signs(signs)) => Cow::Owned(pack_signs(signs)),
            (&Encoding::Codebooks { pq, channels }, TensorData::F32(books)) => {
                Cow::Owned(codebooks::encode(pq, channels, books))
            }
            (&Encoding::Scales { pq, channels }, TensorData::F32(books)) => {
                Cow::Owned(bytes(&codebooks::scales(pq, channels, books)))
            }
            (_, TensorData::F32(floats)) => Cow::Owned(bytes(floats)),
            (_, TensorData::Codes(_) | TensorData::Signs(_)) => {
                unreachable!("Network::new has compared contents")
            }
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

struct EncodedTensor<'a> {
    stored: StoredTensor,
    tensor: &'a Tensor,
}

impl View for EncodedTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.stored.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.stored.encode(&self.tensor.data)
    }

    fn data_len(&self) -> usize {
        self.stored.shape.iter().product::<usize>() * self.stored.dtype.bitsize() / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        network_with(CodebookBits::Float32)
    }

    /// The codebooks of `conv1` have numbers that all forms give back.
    fn network_with(bits: CodebookBits) -> Network {
        let graph = r#"{
            "input": {"name": "input", "shape": [6, 4, 4]},
            "nodes": [
                {"name": "conv1", "inputs": ["input"], "op": {"type": "conv", "out_channels": 4,
                 "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1],
                 "groups": 2, "bias": true, "weights": {"type": "product_quantized",
                 "n_subspaces": 2, "n_centroids": 5, "subvector_dim": 2, "codebook_groups": 2,
                 "codebook_bits": BITS}}},
                {"name": "flat", "inputs": ["conv1"], "op": {"type": "flatten"}},
                {"name": "fc1", "inputs": ["flat"], "op": {"type": "fc", "out_features": 3,
                 "bias": false, "weights": {"type": "dense"}}}
            ],
            "output": "fc1",
            "metadata": {"class_names": ["a", "b", "c"]}
        }"#;
        let graph = graph.replace("BITS", &u8::from(bits).to_string());
        let graph = Graph::from_json(&graph).unwrap();
        let mut tensors = Tensors::new();
        for (name, spec) in &graph.layout().unwrap().tensors {
            let n: usize = spec.shape.iter().product();
            let data = if spec.codes().is_some() {
                TensorData::Codes((0..n).map(|i| (i * 7 % 5) as u16).collect())
            } else {
                let mut floats: Vec<f32> = (0..n).map(|i| (i as f32).sin()).collect();
                if name == "conv1.codebooks" {
                    // Three channels a group: the second subspace has one pad.
                    for (i, v) in floats.iter_mut().enumerate() {
                        let largest = i % 10 == 4;
                        *v = if largest { 127.0 } else { (*v * 127.0).round() } / 64.0;
                        if i / 10 % 2 == 1 && i % 2 == 1 {
                            *v = 0.0;
                        }
                    }
                }
                TensorData::F32(floats)
            };
            let shape = spec.shape.clone();
            tensors.insert(name.clone(), Tensor { shape, data });
        }
        Network::new(graph, tensors).unwrap()
    }

    const ALL_BITS: [CodebookBits; 3] = [
        CodebookBits::Float32,
        CodebookBits::Float16,
        CodebookBits::Int8,
    ];

    #[test]
    fn round_trip_is_exact_and_deterministic() {
        for bits in ALL_BITS {
            let network = network_with(bits);
            let bytes = to_bytes(&network).unwrap();
            let again = from_bytes(&bytes).unwrap();
            assert_eq!(again.graph(), network.graph());
            for (name, tensor) in network.tensors() {
                match &tensor.data {
                    // They stay packed.
                    TensorData::Codes(codes) => {
                        let node = name.strip_suffix(".codes").unwrap();
                        let mut buffer = Vec::new();
                        assert_eq!(again.codes(node).unwrap().all(&mut buffer), codes);
                    }
                    _ => assert_eq!(again.tensors()[name], *tensor, "{bits:?}"),
                }
            }
            assert_eq!(to_bytes(&again).unwrap(), bytes);
        }
    }

    #[test]
    fn codebooks_are_stored_without_padding() {
        for (bits, dtype) in ALL_BITS
            .into_iter()
            .zip([Dtype::F32, Dtype::F16, Dtype::I8])
        {
            let bytes = to_bytes(&network_with(bits)).unwrap();
            let stored = SafeTensors::deserialize(&bytes).unwrap();
            let codebooks = stored.tensor("conv1.codebooks").unwrap();
            assert_eq!(codebooks.shape(), [2, 5, 3]);
            assert_eq!(codebooks.dtype(), dtype);
            // 4 outputs x 9 taps x 2 subspaces x 3 bits.
            assert_eq!(stored.tensor("conv1.codes").unwrap().shape(), [27]);
            match (bits, stored.tensor("conv1.codebook_scales")) {
                (CodebookBits::Int8, scales) => {
                    let scales = scales.unwrap();
                    assert_eq!(scales.shape(), [2, 2]);
                    assert_eq!(floats(scales.data()), [1.0 / 64.0; 4]);
                }
                (_, scales) => assert!(scales.is_err()),
            }
        }
    }

    #[test]
    fn files_that_name_no_bits_hold_float32() {
        let bytes = to_bytes(&network()).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + header_len]).unwrap();
        let older = header.replace(r#",\"codebook_bits\":32"#, "");
        assert!(older.len() < header.len());
        let mut file = (older.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(older.as_bytes());
        file.extend_from_slice(&bytes[8 + header_len..]);
        let again = from_bytes(&file).unwrap();
        assert_eq!(again.graph(), network().graph());
    }

    #[test]
    fn numbers_that_the_stored_form_does_not_give_back_are_refused() {
        for (bits, bad) in [
            (CodebookBits::Float16, 1.0 + 1e-4),
            (CodebookBits::Float16, 1e5),
            (CodebookBits::Int8, 1.5 / 64.0),
            (CodebookBits::Int8, 128.0 / 64.0),
        ] {
            let network = network_with(bits);
            let mut tensors = network.tensors().clone();
            let codebooks = tensors.get_mut("conv1.codebooks").unwrap();
            let TensorData::F32(books) = &mut codebooks.data else {
                unreachable!("codebooks are floats");
            };
            books[3] = bad;
            let message = Network::new(network.graph().clone(), tensors)
                .unwrap_err()
                .to_string();
            let named = format!(
                "which codebooks of {} bits do not give back",
                u8::from(bits)
            );
            assert!(message.contains(&named), "{message}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = to_bytes(&network_with(CodebookBits::Int8)).unwrap();
        for n in 0..bytes.len() {
            assert!(
                from_bytes(&bytes[..n]).is_err(),
                "{n} of {} bytes",
                bytes.len()
            );
        }
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let bytes = to_bytes(&network_with(CodebookBits::Int8)).unwrap();
        for i in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[i] ^= flip;
                // Most are errors; a changed weight is a valid other network.
                drop(from_bytes(&bad));
            }
        }
    }

    #[test]
    fn other_versions_are_named() {
        let bytes = to_bytes(&network()).unwrap();
        let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
        let at = 8 + text.find(r#"\"version\":1"#).unwrap() + r#"\"version\":"#.len();
        let mut newer = bytes.clone();
        newer[at] = b'9';
        let message = from_bytes(&newer).unwrap_err().to_string();
        assert!(message.contains("version is 9"), "{message}");
    }

    #[test]
    fn a_missing_file_is_an_io_error() {
        let missing = Path::new("no-such-folder/model.qcnn");
        assert!(matches!(read(missing), Err(Error::Io { .. })));
        assert!(matches!(write(missing, &network()), Err(Error::Io { .. })));
    }
}
