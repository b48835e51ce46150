//! `.qcnn` files: safetensors with the graph as JSON in the metadata.
//!
//! The metadata has one entry, `qcnn`: the JSON object
//! `{"version": 1, "graph": …}`. One entry, because safetensors writes several
//! in random order and the same network has to give the same bytes.
//!
//! Tensors are stored under their own names, float32 as `F32`, with two
//! exceptions. `<node>.codes` is `U8`, the bit stream of [`crate::pack`].
//! `<node>.codebooks` is stored without the padding of the last subspace as
//! `(K, channels)` or `(groups, K, channels)`: row `k` holds codeword `k` of
//! every subspace side by side, so that channel `c` of a sub-vector with code
//! `k` is element `(k, c)`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, bail_format};
use crate::graph::{
    Geometry, Graph, Layout, Network, PqGeometry, Tensor, TensorData, TensorSpec, Tensors,
};
use crate::pack::{SharedBytes, pack, packed_len};

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
    let mut tensors = Tensors::new();
    for (name, view) in stored.iter() {
        let Some(spec) = layout.tensors.get(name) else {
            bail_format!("tensor {name:?} belongs to no node of the graph");
        };
        let on_disk = OnDisk::of(name, spec, &layout, &graph);
        if view.dtype() != on_disk.dtype || view.shape() != on_disk.shape {
            bail_format!(
                "tensor {name:?} is {:?} of shape {:?}, expected {:?} of shape {:?}",
                view.dtype(),
                view.shape(),
                on_disk.dtype,
                on_disk.shape
            );
        }
        let Some(info) = metadata.info(name) else {
            bail_format!("tensor {name:?} is missing in the header");
        };
        let start = size_of::<u64>() + header_len;
        let (first, end) = info.data_offsets;
        let bytes = SharedBytes::new(Arc::clone(buffer), start + first..start + end);
        let data = on_disk.decode(bytes);
        let shape = spec.shape.clone();
        tensors.insert(name.to_owned(), Tensor { shape, data });
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
    let views = network.tensors().iter().map(|(name, tensor)| {
        let spec = &network.layout().tensors[name];
        let on_disk = OnDisk::of(name, spec, network.layout(), network.graph());
        (name, EncodedTensor { on_disk, tensor })
    });
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), header)]);
    safetensors::serialize(views, Some(metadata))
        .map_err(|e| Error::Format(format!("cannot be written as safetensors: {e}")))
}

/// How a tensor is stored.
struct OnDisk {
    dtype: Dtype,
    shape: Vec<usize>,
    encoding: Encoding,
}

enum Encoding {
    Floats,
    /// Codes of `bits` bits.
    Codes {
        bits: u32,
    },
    /// `(sets, M, K, dsub)` in memory, `(sets, K, channels)` on disk.
    Codebooks {
        pq: PqGeometry,
        channels: usize,
    },
}

impl OnDisk {
    /// `name` and `spec` are an entry of `layout.tensors`.
    fn of(name: &str, spec: &TensorSpec, layout: &Layout, graph: &Graph) -> Self {
        if let Some(pq) = spec.codes {
            let n = spec.shape.iter().product();
            let bits = pq.code_bits();
            return Self {
                dtype: Dtype::U8,
                shape: vec![packed_len(n, bits)],
                encoding: Encoding::Codes { bits },
            };
        }
        if let Some(node) = name.strip_suffix(".codebooks") {
            let index = graph.nodes.iter().position(|n| n.name == node);
            let found = match index.map(|i| &layout.geometries[i]) {
                Some(Geometry::Conv(conv, Some(pq))) => Some((*pq, conv.group_in_channels())),
                Some(&Geometry::Fc(inputs, _, Some(pq))) => Some((pq, inputs)),
                _ => None,
            };
            if let Some((pq, channels)) = found {
                let mut shape = vec![pq.n_centroids, channels];
                if pq.codebook_groups > 1 {
                    shape.insert(0, pq.codebook_groups);
                }
                return Self {
                    dtype: Dtype::F32,
                    shape,
                    encoding: Encoding::Codebooks { pq, channels },
                };
            }
        }
        Self {
            dtype: Dtype::F32,
            shape: spec.shape.clone(),
            encoding: Encoding::Floats,
        }
    }

    /// `bytes` has the length that `dtype` and `shape` imply.
    fn decode(&self, bytes: SharedBytes) -> TensorData {
        let floats = || -> Vec<f32> {
            let (chunks, _) = bytes.as_chunks::<4>();
            chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        match self.encoding {
            Encoding::Floats => TensorData::F32(floats()),
            Encoding::Codes { .. } => TensorData::PackedCodes(bytes),
            Encoding::Codebooks { pq, channels } => {
                let stored = floats();
                let mut books =
                    vec![
                        0.0;
                        pq.codebook_groups * pq.n_subspaces * pq.n_centroids * pq.subvector_dim
                    ];
                for_each_codeword(pq, channels, |padded, real| {
                    books[padded..padded + real.len()].copy_from_slice(&stored[real]);
                });
                TensorData::F32(books)
            }
        }
    }

    fn encode<'a>(&self, data: &'a TensorData) -> Cow<'a, [u8]> {
        let bytes = |floats: &[f32]| floats.iter().flat_map(|v| v.to_le_bytes()).collect();
        match (&self.encoding, data) {
            (_, TensorData::PackedCodes(packed)) => Cow::Borrowed(packed),
            (&Encoding::Codes { bits }, TensorData::Codes(codes)) => Cow::Owned(pack(codes, bits)),
            (&Encoding::Codebooks { pq, channels }, TensorData::F32(books)) => {
                let mut stored = vec![0.0; pq.codebook_groups * pq.n_centroids * channels];
                for_each_codeword(pq, channels, |padded, real| {
                    let n = real.len();
                    stored[real].copy_from_slice(&books[padded..padded + n]);
                });
                Cow::Owned(bytes(&stored))
            }
            (_, TensorData::F32(floats)) => Cow::Owned(bytes(floats)),
            (_, TensorData::Codes(_)) => unreachable!("a network's codes have a code spec"),
        }
    }
}

/// Call `visit(start of the codeword in memory, its range on disk)` for each.
fn for_each_codeword(
    pq: PqGeometry,
    channels: usize,
    mut visit: impl FnMut(usize, std::ops::Range<usize>),
) {
    for set in 0..pq.codebook_groups {
        for m in 0..pq.n_subspaces {
            let first = m * pq.subvector_dim;
            let real = pq.subvector_dim.min(channels - first);
            for k in 0..pq.n_centroids {
                let in_memory =
                    ((set * pq.n_subspaces + m) * pq.n_centroids + k) * pq.subvector_dim;
                let on_disk = (set * pq.n_centroids + k) * channels + first;
                visit(in_memory, on_disk..on_disk + real);
            }
        }
    }
}

struct EncodedTensor<'a> {
    on_disk: OnDisk,
    tensor: &'a Tensor,
}

impl View for EncodedTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.on_disk.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.on_disk.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.on_disk.encode(&self.tensor.data)
    }

    fn data_len(&self) -> usize {
        self.on_disk.shape.iter().product::<usize>() * self.on_disk.dtype.bitsize() / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        let graph = r#"{
            "input": {"name": "input", "shape": [6, 4, 4]},
            "nodes": [
                {"name": "conv1", "inputs": ["input"], "op": {"type": "conv", "out_channels": 4,
                 "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1],
                 "groups": 2, "bias": true, "weights": {"type": "product_quantized",
                 "n_subspaces": 2, "n_centroids": 5, "subvector_dim": 2, "codebook_groups": 2}}},
                {"name": "flat", "inputs": ["conv1"], "op": {"type": "flatten"}},
                {"name": "fc1", "inputs": ["flat"], "op": {"type": "fc", "out_features": 3,
                 "bias": false, "weights": {"type": "dense"}}}
            ],
            "output": "fc1",
            "metadata": {"class_names": ["a", "b", "c"]}
        }"#;
        let graph = Graph::from_json(graph).unwrap();
        let mut tensors = Tensors::new();
        for (name, spec) in &graph.layout().unwrap().tensors {
            let n: usize = spec.shape.iter().product();
            let data = if spec.codes.is_some() {
                TensorData::Codes((0..n).map(|i| (i * 7 % 5) as u16).collect())
            } else {
                let mut floats: Vec<f32> = (0..n).map(|i| (i as f32).sin()).collect();
                if name == "conv1.codebooks" {
                    // Three channels a group: the second subspace has one pad.
                    for (i, v) in floats.iter_mut().enumerate() {
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

    #[test]
    fn round_trip_is_exact_and_deterministic() {
        let network = network();
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
                _ => assert_eq!(again.tensors()[name], *tensor),
            }
        }
        assert_eq!(to_bytes(&again).unwrap(), bytes);
    }

    #[test]
    fn codebooks_are_stored_without_padding() {
        let bytes = to_bytes(&network()).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(stored.tensor("conv1.codebooks").unwrap().shape(), [2, 5, 3]);
        // 4 outputs x 9 taps x 2 subspaces x 3 bits.
        assert_eq!(stored.tensor("conv1.codes").unwrap().shape(), [27]);
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = to_bytes(&network()).unwrap();
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
        let bytes = to_bytes(&network()).unwrap();
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
