//! Python bindings: arrays in, arrays out, no mathematics.

#![allow(
    clippy::needless_pass_by_value,
    reason = "PyO3 hands extracted arguments over by value"
)]

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::{
    IntoPyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyReadonlyArray3,
    PyReadonlyArrayDyn, PyReadwriteArray3, PyUntypedArrayMethods, ToPyArray,
};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use qcnn_core::session::Options;
use qcnn_core::{
    Error, Graph, Isa, Network, Session, Tensor, TensorData, Tensors, Workspace, container,
};

use qcnn_quantizer::descent::{self, Books, Window};
use qcnn_quantizer::kmeans;

/// Memory one workspace may take before a batch is cut into pieces.
const WORKSPACE_BYTES: usize = 64 << 20;

/// `OSError` of an error number: `FileNotFoundError` and its like.
fn os_error(py: Python<'_>, code: i32, path: String) -> PyResult<PyErr> {
    let message: String = py
        .import("os")?
        .call_method1("strerror", (code,))?
        .extract()?;
    Ok(PyOSError::new_err((code, message, path)))
}

/// The one place where engine errors become Python exceptions.
fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let class = match error {
        Error::Io { path, source } => {
            let path = path.display().to_string();
            return match source.raw_os_error() {
                Some(code) => os_error(py, code, path).unwrap_or_else(|e| e),
                // No number, but a kind that picks the subclass all the same.
                None => io::Error::new(source.kind(), format!("{path}: {source}")).into(),
            };
        }
        Error::Format(_) => "ModelFormatError",
        Error::Shape(_) => "ShapeError",
        Error::Config(_) => "ConfigError",
    };
    let raised = py
        .import("qcnn_py.errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1((error.to_string(),)));
    match raised {
        Ok(instance) => PyErr::from_value(instance),
        Err(e) => e,
    }
}

/// Run `work` without the GIL and translate its errors.
fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|e| to_python(py, e))
}

/// `Err` with a `ShapeError` unless `holds`.
fn expect(py: Python<'_>, holds: bool, message: impl FnOnce() -> String) -> PyResult<()> {
    if holds {
        return Ok(());
    }
    Err(to_python(py, Error::Shape(message())))
}

/// Copy a network's tensors out of NumPy.
fn tensors_from_python(tensors: &Bound<'_, PyDict>) -> PyResult<Tensors> {
    let mut out = Tensors::new();
    for (name, array) in tensors.iter() {
        let name: String = name.extract()?;
        let (shape, data) = if let Ok(floats) = array.extract::<PyReadonlyArrayDyn<'_, f32>>() {
            (
                floats.shape().to_vec(),
                TensorData::F32(floats.as_slice()?.to_vec()),
            )
        } else if let Ok(signs) = array.extract::<PyReadonlyArrayDyn<'_, i8>>() {
            (
                signs.shape().to_vec(),
                TensorData::Signs(signs.as_slice()?.to_vec()),
            )
        } else if let Ok(codes) = array.extract::<PyReadonlyArrayDyn<'_, u8>>() {
            let wide = codes.as_slice()?.iter().map(|&c| u16::from(c)).collect();
            (codes.shape().to_vec(), TensorData::Codes(wide))
        } else {
            let codes = array.extract::<PyReadonlyArrayDyn<'_, u16>>()?;
            (
                codes.shape().to_vec(),
                TensorData::Codes(codes.as_slice()?.to_vec()),
            )
        };
        out.insert(name, Tensor { shape, data });
    }
    Ok(out)
}

/// Instruction-set levels of this machine, slowest first.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    Isa::available().iter().map(|isa| isa.name()).collect()
}

/// Cluster vectors by k-means; returns labels.
#[pyfunction]
fn cluster<'py>(
    py: Python<'py>,
    vectors: PyReadonlyArray2<'py, f64>,
    draws: PyReadonlyArray2<'py, f64>,
    max_rounds: usize,
    tolerance: f64,
    threads: usize,
) -> PyResult<(Bound<'py, PyArray1<i64>>, f64)> {
    let (shape, n_clusters) = (vectors.shape(), draws.shape()[0]);
    expect(py, vectors.len() > 0 && draws.len() > 0, || {
        format!(
            "vectors and draws have shapes {shape:?} and {:?}, expected no zero in them",
            draws.shape()
        )
    })?;
    let (x, random) = (vectors.as_slice()?, draws.as_slice()?);
    let dim = shape[1];
    let (labels, error) =
        py.detach(|| kmeans::cluster(x, dim, n_clusters, random, max_rounds, tolerance, threads));
    Ok((labels.into_pyarray(py), error))
}

/// Choose codes of a subspace, or place its codewords, in a window; see
/// `qcnn_quantizer::descent::assign`. Changes weight, residual and codes.
#[pyfunction]
#[allow(
    clippy::too_many_arguments,
    reason = "one call per subspace, arrays in place"
)]
fn assign<'py>(
    py: Python<'py>,
    gram: PyReadonlyArray3<'py, f64>,
    mut weight: PyReadwriteArray3<'py, f64>,
    mut residual: PyReadwriteArray3<'py, f64>,
    books: PyReadonlyArray3<'py, f64>,
    mut codes: PyReadwriteArray3<'py, i64>,
    first: usize,
    choose: bool,
    threads: usize,
) -> PyResult<()> {
    let (g, w, b, c) = (gram.shape(), weight.shape(), books.shape(), codes.shape());
    let (rows, n_centroids, dim) = (w[2], b[1], b[2]);
    let fits = [w[0], rows, rows] == g
        && residual.shape() == w
        && c[..2] == w[..2]
        && (b[0] == 1 || b[0] == w[0])
        && first + c[2] * dim <= rows;
    expect(py, fits && weight.len() > 0, || {
        format!(
            "gram, weight, residual, books, codes have shapes {g:?}, {w:?}, {:?}, {b:?}, \
             {c:?}, expected (groups, rows, rows), (groups, outputs, rows) twice, (1 or \
             groups, K, dim), (groups, outputs, positions), from row {first} on",
            residual.shape()
        )
    })?;
    let outputs = w[1];
    let sets = b[0];
    let codes = codes.as_slice_mut()?;
    expect(py, known(codes, n_centroids), || {
        format!("codes are out of range, expected 0 to {n_centroids} - 1")
    })?;
    let (words, gram) = (books.as_slice()?, gram.as_slice()?);
    let (weight, residual) = (weight.as_slice_mut()?, residual.as_slice_mut()?);
    py.detach(|| {
        let mut window = Window {
            gram,
            weight,
            residual,
            rows,
            outputs,
        };
        let books = Books { words, dim, sets };
        descent::assign(&mut window, books, codes, first, choose, threads);
    });
    Ok(())
}

/// Normal matrix of the codewords of a subspace, (K * dim, K * dim).
#[pyfunction]
fn normal_matrix<'py>(
    py: Python<'py>,
    gram: PyReadonlyArray3<'py, f64>,
    codes: PyReadonlyArray3<'py, i64>,
    n_centroids: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (g, c) = (gram.shape(), codes.shape());
    let fits = g[0] == c[0] && g[1] == g[2] && c[2] > 0 && g[1] % c[2] == 0;
    expect(py, fits && gram.len() * codes.len() > 0, || {
        format!(
            "gram and codes have shapes {g:?} and {c:?}, expected (groups, rows, rows) and \
             (groups, outputs, positions), rows a multiple of positions"
        )
    })?;
    let (dim, outputs) = (g[1] / c[2], c[1]);
    let (gram, codes) = (gram.as_slice()?, codes.as_slice()?);
    expect(py, known(codes, n_centroids), || {
        format!("codes are out of range, expected 0 to {n_centroids} - 1")
    })?;
    let normal = py.detach(|| descent::normal_matrix(gram, codes, dim, outputs, n_centroids));
    Ok(normal.into_pyarray(py))
}

/// Whether all codes stand for one of `n_centroids` codewords.
fn known(codes: &[i64], n_centroids: usize) -> bool {
    codes
        .iter()
        .all(|&code| (0..n_centroids as i64).contains(&code))
}

/// A checked network outside of Python. Codes read from a file stay packed.
#[pyclass(frozen, module = "qcnn_py._engine", name = "Network")]
struct PyNetwork {
    network: Network,
}

#[pymethods]
impl PyNetwork {
    /// Check a network.
    #[new]
    fn new(py: Python<'_>, graph: &str, tensors: &Bound<'_, PyDict>) -> PyResult<Self> {
        let tensors = tensors_from_python(tensors)?;
        let network = detached(py, || Network::new(Graph::from_json(graph)?, tensors))?;
        Ok(Self { network })
    }

    /// Read a `.qcnn` file.
    #[staticmethod]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let network = detached(py, || container::read(&path))?;
        Ok(Self { network })
    }

    /// Write a `.qcnn` file.
    fn write(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        detached(py, || container::write(&path, &self.network))
    }

    /// Check the content of a `.qcnn` file.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, content: &[u8]) -> PyResult<Self> {
        let network = detached(py, || container::from_bytes(content))?;
        Ok(Self { network })
    }

    /// The content of a `.qcnn` file.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let content = detached(py, || container::to_bytes(&self.network))?;
        Ok(PyBytes::new(py, &content))
    }

    /// The graph in canonical form.
    #[getter]
    fn graph(&self) -> String {
        self.network.graph().to_json()
    }

    /// Shape of every value.
    #[getter]
    fn shapes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let shapes = PyDict::new(py);
        let graph = self.network.graph();
        let values = std::iter::once(&graph.input.name).chain(graph.nodes.iter().map(|n| &n.name));
        for name in values {
            shapes.set_item(name, PyTuple::new(py, self.network.shape(name))?)?;
        }
        Ok(shapes)
    }

    /// Copies of all tensors, codes and signs unpacked.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let tensors = PyDict::new(py);
        let mut buffer = Vec::new();
        for (name, tensor) in self.network.tensors() {
            let array = if let TensorData::F32(floats) = &tensor.data {
                floats.to_pyarray(py).into_any()
            } else if let Some(signs) = name
                .strip_suffix(".signs")
                .and_then(|node| self.network.signs(node))
            {
                signs.to_pyarray(py).into_any()
            } else {
                let node = name.strip_suffix(".codes").unwrap_or(name);
                let codes = self.network.codes(node);
                let codes = codes.map_or_else(Default::default, |c| c.all(&mut buffer));
                let spec = self.network.layout().tensors[name].codes();
                if spec.is_some_and(|pq| pq.n_centroids <= 256) {
                    let narrow: Vec<u8> = codes.iter().map(|&c| c as u8).collect();
                    narrow.to_pyarray(py).into_any()
                } else {
                    codes.to_pyarray(py).into_any()
                }
            };
            let shape = PyTuple::new(py, &tensor.shape)?;
            tensors.set_item(name, array.call_method1("reshape", (shape,))?)?;
        }
        Ok(tensors)
    }
}

/// A network planned for this machine.
#[pyclass(frozen, module = "qcnn_py._engine", name = "Session")]
struct PySession {
    session: Session,
    /// Most images one workspace takes.
    max_batch: usize,
    /// Workspaces between calls; a call takes one for each of its threads.
    idle: Mutex<Vec<Workspace>>,
    input_len: usize,
    output_shape: Vec<usize>,
    node_shapes: Vec<(String, Vec<usize>)>,
}

impl PySession {
    /// An idle workspace that holds `batch` images, or a new one.
    fn take_workspace(&self, batch: usize) -> Result<Workspace, Error> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = idle.iter().position(|w| w.max_batch() >= batch) {
            return Ok(idle.swap_remove(i));
        }
        // A growing batch replaces what was too small for it.
        idle.pop();
        drop(idle);
        Workspace::new(&self.session, batch)
    }

    fn put_back(&self, workspace: Workspace) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(workspace);
    }

    /// Run images one workspace-full after the other.
    fn run_serially(&self, input: &[f32], output: &mut [f32]) -> Result<(), Error> {
        let n = input.len() / self.input_len;
        let batch = n.min(self.max_batch);
        if batch == 0 {
            return Ok(());
        }
        let mut workspace = self.take_workspace(batch)?;
        let output_len: usize = self.output_shape.iter().product();
        let inputs = input.chunks(batch * self.input_len);
        let outputs = output.chunks_mut(batch * output_len);
        let result = inputs.zip(outputs).try_for_each(|(x, y)| {
            self.session
                .run(&mut workspace, x, x.len() / self.input_len, y)
        });
        self.put_back(workspace);
        result
    }
}

#[pymethods]
impl PySession {
    #[new]
    fn new(
        py: Python<'_>,
        network: &Bound<'_, PyNetwork>,
        precision: &str,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let network = &network.get().network;
        detached(py, || {
            let options = Options {
                isa: isa.map(str::parse).transpose()?,
                precision: precision.parse()?,
            };
            let session = Session::new(network, options)?;
            let bytes = session.workspace_bytes(1).max(1);
            let graph = network.graph();
            let node_shapes = graph
                .nodes
                .iter()
                .map(|n| (n.name.clone(), network.shape(&n.name).to_vec()));
            Ok(Self {
                max_batch: (WORKSPACE_BYTES / bytes).clamp(1, 64),
                idle: Mutex::new(Vec::new()),
                input_len: graph.input.shape.iter().product(),
                output_shape: network.shape(&graph.output).to_vec(),
                node_shapes: node_shapes.collect(),
                session,
            })
        })
    }

    #[getter]
    fn isa(&self) -> &'static str {
        self.session.isa().name()
    }

    #[getter]
    fn precision(&self) -> &'static str {
        self.session.precision().name()
    }

    /// Kernel of each layer with weights.
    #[getter]
    fn kernels(&self) -> HashMap<&str, &str> {
        self.session.kernels().collect()
    }

    /// Output of a batch, cut into `threads` parts of neighbouring images.
    fn run<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArrayDyn<'py, f32>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let n = x.shape()[0];
        let input = x.as_slice()?;
        let output_len: usize = self.output_shape.iter().product();
        let mut output = vec![0.0; n * output_len];
        detached(py, || {
            let share = n.div_ceil(threads.max(1)).max(1);
            let mut parts = input
                .chunks(share * self.input_len)
                .zip(output.chunks_mut(share * output_len));
            let Some((first_in, first_out)) = parts.next() else {
                return Ok(());
            };
            std::thread::scope(|scope| {
                let others: Vec<_> = parts
                    .map(|(x, y)| scope.spawn(|| self.run_serially(x, y)))
                    .collect();
                let first = self.run_serially(first_in, first_out);
                others.into_iter().fold(first, |result, other| {
                    let other = other
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    result.and(other)
                })
            })
        })?;
        let shape: Vec<usize> = std::iter::once(n)
            .chain(self.output_shape.iter().copied())
            .collect();
        PyArrayDyn::from_owned_array(
            py,
            numpy::ndarray::ArrayD::from_shape_vec(shape, output)
                .map_err(|e| PyErr::new::<pyo3::exceptions::PyRuntimeError, _>(e.to_string()))?,
        )
        .into_pyobject(py)
        .map_err(Into::into)
    }

    /// Response of every node by name.
    fn trace<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArrayDyn<'py, f32>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let n = x.shape()[0];
        let input = x.as_slice()?;
        let mut values: Vec<Vec<f32>> = self
            .node_shapes
            .iter()
            .map(|(_, shape)| Vec::with_capacity(n * shape.iter().product::<usize>()))
            .collect();
        detached(py, || {
            let batch = n.min(self.max_batch);
            if batch == 0 {
                return Ok(());
            }
            let mut workspace = self.take_workspace(batch)?;
            let result = input.chunks(batch * self.input_len).try_for_each(|part| {
                let n = part.len() / self.input_len;
                // Nodes are shown in the network's order.
                let mut targets = values.iter_mut();
                self.session.trace(&mut workspace, part, n, |_, value| {
                    if let Some(target) = targets.next() {
                        target.extend_from_slice(value);
                    }
                })
            });
            self.put_back(workspace);
            result
        })?;
        let traced = PyDict::new(py);
        for ((name, shape), value) in self.node_shapes.iter().zip(values) {
            let shape: Vec<usize> = std::iter::once(n).chain(shape.iter().copied()).collect();
            traced.set_item(name, value.to_pyarray(py).reshape(shape)?)?;
        }
        Ok(traced)
    }
}

/// The engine as a Python module; `qcnn_py` wraps it.
#[pymodule(gil_used = false)]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(available_isas, module)?)?;
    module.add_function(wrap_pyfunction!(cluster, module)?)?;
    module.add_function(wrap_pyfunction!(assign, module)?)?;
    module.add_function(wrap_pyfunction!(normal_matrix, module)?)?;
    module.add_class::<PyNetwork>()?;
    module.add_class::<PySession>()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
