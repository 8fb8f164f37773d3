//! `whence._core.Hash`, `HashIndex` and what is made of codes.

use numpy::{
    Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::hash::family::{self, Codes, Family};
use whence_core::hash::graph::{self, Batches, Graph, Views};
use whence_core::hash::index::{self, Request};
use whence_core::hash::{duplicates, shuffle};
use whence_core::memory;

use crate::boundary::{compute, compute_alone, copied, exception, values_of};

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Hash {
    hash: family::Hash,
}

#[pymethods]
impl Hash {
    #[new]
    #[pyo3(signature = (family, dim, hashes, seed, view=0, width=1.0, levels=1))]
    fn new(
        py: Python<'_>,
        family: &str,
        dim: usize,
        hashes: usize,
        seed: u64,
        view: u64,
        width: f64,
        levels: usize,
    ) -> PyResult<Self> {
        let hash = compute_alone(py, |watch| {
            let family = match family {
                "sign" => Family::Sign,
                "p_stable" => Family::PStable { width, levels },
                other => return Err(Error::argument("family", "sign or p_stable", other)),
            };
            family::Hash::new(family, dim, hashes, seed, view, watch)
        })?;
        Ok(Self { hash })
    }

    fn project<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray2<'_, f32>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let values = self.rows(py, "rows", &rows)?;
        let found = compute(py, |asker| self.hash.project(values, threads, asker))?;
        found.into_pyarray(py).reshape([rows.shape()[0], self.hash.hashes()])
    }

    fn codes<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray2<'_, f32>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let values = self.rows(py, "rows", &rows)?;
        let codes = compute(py, |asker| self.hash.codes(values, threads, asker))?;
        array_of(py, codes, [rows.shape()[0], self.hash.code_len()])
    }
}

impl Hash {
    /// The values of rows of this width.
    fn rows<'a>(
        &self,
        py: Python<'_>,
        argument: &'static str,
        rows: &'a PyReadonlyArray2<'_, f32>,
    ) -> PyResult<&'a [f32]> {
        if rows.shape()[1] != self.hash.dim() {
            let must = format!("[rows, {}]", self.hash.dim());
            let got = format!("{:?}", rows.shape());
            return Err(exception(py, &Error::shape(argument, must, got)));
        }
        values_of(py, argument, rows)
    }
}

/// Codes as an array.
fn array_of(py: Python<'_>, codes: Codes, shape: [usize; 2]) -> PyResult<Bound<'_, PyAny>> {
    Ok(match codes {
        Codes::Bits(bits) => bits.into_pyarray(py).reshape(shape)?.into_any(),
        Codes::Cells(cells) => cells.into_pyarray(py).reshape(shape)?.into_any(),
    })
}

/// An array as codes.
fn codes_of(py: Python<'_>, codes: &Bound<'_, PyAny>) -> PyResult<Codes> {
    if let Ok(bits) = codes.extract::<PyReadonlyArray2<'_, u64>>() {
        return Ok(Codes::Bits(copied(py, "codes", &bits)?));
    }
    let cells = codes.extract::<PyReadonlyArray2<'_, i32>>()?;
    Ok(Codes::Cells(copied(py, "codes", &cells)?))
}

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct HashIndex {
    index: index::Index,
}

type Positions<'py> = Bound<'py, PyArray2<u64>>;
type Scores<'py> = Bound<'py, PyArray2<f32>>;

#[pymethods]
impl HashIndex {
    #[new]
    fn new(
        py: Python<'_>,
        hash: PyRef<'_, Hash>,
        rows: PyReadonlyArray2<'_, f32>,
        band: Option<usize>,
        threads: usize,
    ) -> PyResult<Self> {
        let values = hash.rows(py, "rows", &rows)?;
        let hash = hash.hash.clone();
        let index = compute(py, |asker| index::Index::new(hash, values, band, threads, asker))?;
        Ok(Self { index })
    }

    #[getter]
    fn tables(&self) -> usize {
        self.index.tables()
    }

    fn codes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let shape = [self.index.len(), self.index.hash().code_len()];
        let codes = compute_alone(py, |watch| {
            Ok(match self.index.codes() {
                Codes::Bits(bits) => Codes::Bits(memory::copied(bits, watch)?),
                Codes::Cells(cells) => Codes::Cells(memory::copied(cells, watch)?),
            })
        })?;
        array_of(py, codes, shape)
    }

    fn search<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray2<'_, f32>,
        queries: PyReadonlyArray2<'_, f32>,
        k: usize,
        candidates: usize,
        probes: Option<usize>,
        smallest: bool,
        threads: usize,
    ) -> PyResult<(Positions<'py>, Scores<'py>, Bound<'py, PyArray1<u64>>)> {
        let dim = self.index.hash().dim();
        if queries.shape()[1] != dim {
            let got = format!("{:?}", queries.shape());
            let error = Error::shape("queries", format!("[queries, {dim}]"), got);
            return Err(exception(py, &error));
        }
        let rows = values_of(py, "rows", &rows)?;
        let queries = values_of(py, "queries", &queries)?;
        let request = Request { rows, queries, k, candidates, probes, smallest };
        let found = compute(py, |asker| self.index.search(&request, threads, asker))?;
        let hits = || found.iter().flat_map(|found| &found.hits);
        let positions: Vec<u64> = hits().map(|hit| hit.example).collect();
        let scores: Vec<f32> = hits().map(|hit| hit.score).collect();
        let rescored: Vec<u64> = found.iter().map(|found| found.rescored as u64).collect();
        let shape = [found.len(), found.first().map_or(0, |found| found.hits.len())];
        Ok((
            positions.into_pyarray(py).reshape(shape)?,
            scores.into_pyarray(py).reshape(shape)?,
            rescored.into_pyarray(py),
        ))
    }
}

/// The share of hashes on which each pair of rows agrees.
#[pyfunction]
pub(crate) fn code_similarities<'py>(
    py: Python<'py>,
    codes: &Bound<'py, PyAny>,
    hashes: usize,
    level: usize,
    pairs: PyReadonlyArray2<'_, u64>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let codes = codes_of(py, codes)?;
    if pairs.shape()[1] != 2 {
        let got = format!("{:?}", pairs.shape());
        return Err(exception(py, &Error::shape("pairs", "[pairs, 2]", got)));
    }
    let (pairs, _) = values_of(py, "pairs", &pairs)?.as_chunks::<2>();
    let found =
        compute_alone(py, |watch| family::similarities(&codes, hashes, level, pairs, watch))?;
    Ok(found.into_pyarray(py))
}

type Lists<'py, W> =
    (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<W>>);

fn lists<W: Element>(py: Python<'_>, graph: Graph<W>) -> Lists<'_, W> {
    (
        graph.starts.into_pyarray(py),
        graph.neighbours.into_pyarray(py),
        graph.weights.into_pyarray(py),
    )
}

/// The most similar rows of each among those that share a bucket.
#[pyfunction]
pub(crate) fn graph_by_codes<'py>(
    py: Python<'py>,
    views: Vec<PyReadonlyArray2<'_, i32>>,
    levels: usize,
    band: usize,
    cap: usize,
    k: usize,
    seed: u64,
    threads: usize,
) -> PyResult<Lists<'py, f32>> {
    let [rows, hashes] = views.first().map_or([0, 0], |view| [view.shape()[0], view.shape()[1]]);
    let copy = |view: &PyReadonlyArray2<'_, i32>| Ok(Codes::Cells(copied(py, "views", view)?));
    let views = views.iter().map(copy).collect::<PyResult<Vec<Codes>>>()?;
    let request = Views { views: &views, rows, hashes, levels, band, cap, k, seed };
    Ok(lists(py, compute(py, |asker| graph::by_codes(&request, threads, asker))?))
}

/// The nearest rows of each within its batch, by squared distance, and each batch's median distance.
#[pyfunction]
pub(crate) fn graph_within_batches<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray2<'_, f32>,
    batches: Vec<Vec<u32>>,
    k: usize,
    radius: f64,
    threads: usize,
) -> PyResult<(Lists<'py, f64>, Bound<'py, PyArray1<f64>>)> {
    let values = values_of(py, "rows", &rows)?;
    let request = Batches { values, dim: rows.shape()[1], batches: &batches, k, radius };
    let (graph, medians) = compute(py, |asker| graph::within_batches(&request, threads, asker))?;
    Ok((lists(py, graph), medians.into_pyarray(py)))
}

/// The lowest row of the group of each row.
#[pyfunction]
pub(crate) fn duplicate_groups<'py>(
    py: Python<'py>,
    hash: PyRef<'_, Hash>,
    rows: PyReadonlyArray2<'_, f32>,
    band: usize,
    threshold: f64,
    cap: usize,
    seed: u64,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let values = hash.rows(py, "rows", &rows)?;
    let hash = &hash.hash;
    let found = compute(py, |asker| {
        duplicates::groups(hash, values, band, threshold, cap, seed, threads, asker)
    })?;
    Ok(found.into_pyarray(py))
}

/// Numbers in a random order.
#[pyfunction]
pub(crate) fn shuffled<'py>(
    py: Python<'py>,
    numbers: PyReadonlyArray1<'_, i64>,
    seed: u64,
    name: &str,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let mut numbers = copied(py, "numbers", &numbers)?;
    compute_alone(py, |watch| shuffle::shuffle(&mut numbers, seed, name, watch))?;
    Ok(numbers.into_pyarray(py))
}
