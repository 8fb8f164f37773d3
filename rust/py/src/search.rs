//! `whence._core.Rows`.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use half::{bf16, f16};
use numpy::{
    Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyUntypedArrayMethods, ToPyArray,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::kernels::Lines;
use whence_core::search::certified;
use whence_core::search::codes::{self, Bits, Segment};
use whence_core::search::rotation::Rotation;
use whence_core::search::{self, Ends, Hit, Request, Sides, graph};
use whence_core::store::{Kind, Shard};

use crate::boundary::{compute, exception, not_contiguous};

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Rows {
    rows: search::Rows,
    dim: usize,
}

type Side<'py> = (Bound<'py, PyArray2<u64>>, Bound<'py, PyArray2<f32>>);

fn kind_of(dtype: &str) -> Result<Kind, Error> {
    match dtype {
        "float32" => Ok(Kind::F32),
        "float16" => Ok(Kind::F16),
        "int8" => Ok(Kind::I8),
        _ => Err(Error::argument("dtype", "float32, float16 or int8", dtype)),
    }
}

#[pymethods]
impl Rows {
    #[new]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, u64, u64)>,
        dim: usize,
        dtype: &str,
        scales: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<Self> {
        let scales = scales.as_slice().map_err(|_| not_contiguous(py, "scales"))?.to_vec();
        let rows = compute(py, |_| {
            let kind = kind_of(dtype)?;
            let files: Result<Vec<_>, _> = files
                .iter()
                .map(|(path, offset, rows)| Shard::in_file(path, *offset, *rows, dim, kind))
                .collect();
            search::Rows::new(files?, scales, dim)
        })?;
        Ok(Self { rows, dim })
    }

    /// The rows of a matrix, copied, in memory.
    #[staticmethod]
    fn of(py: Python<'_>, matrix: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(values) = matrix.extract::<PyReadonlyArray2<'_, f32>>() {
            return Self::in_memory(py, &values, Shard::in_memory);
        }
        if let Ok(values) = matrix.extract::<PyReadonlyArray2<'_, f16>>() {
            return Self::in_memory(py, &values, Shard::halves_in_memory);
        }
        let values = matrix.extract::<PyReadonlyArray2<'_, i8>>()?;
        Self::in_memory(py, &values, Shard::bytes_in_memory)
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        numbers: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let numbers = numbers.as_slice().map_err(|_| not_contiguous(py, "numbers"))?;
        let values = compute(py, |_| self.rows.scaled(numbers))?;
        values.into_pyarray(py).reshape([numbers.len(), self.dim])
    }

    /// The rows of some numbers, in memory.
    fn gathered(&self, py: Python<'_>, numbers: PyReadonlyArray1<'_, u64>) -> PyResult<Self> {
        let numbers = numbers.as_slice().map_err(|_| not_contiguous(py, "numbers"))?;
        let rows = compute(py, |_| self.rows.gathered(numbers))?;
        Ok(Self { rows, dim: self.dim })
    }

    fn norms<'py>(&self, py: Python<'py>, threads: usize) -> PyResult<Bound<'py, PyArray1<f32>>> {
        Ok(compute(py, |asker| self.rows.norms(threads, asker))?.into_pyarray(py))
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.rows.bytes()
    }

    #[getter]
    fn resident(&self) -> bool {
        self.rows.in_memory()
    }

    #[pyo3(signature = (rows, queries, k, sides, excluded, norms, threads, segments=vec![]))]
    fn ends<'py>(
        &self,
        py: Python<'py>,
        rows: Option<PyReadonlyArray2<'_, u64>>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        sides: (bool, bool),
        excluded: Vec<Vec<u64>>,
        norms: Option<PyReadonlyArray1<'_, f32>>,
        threads: usize,
        segments: Vec<(usize, usize)>,
    ) -> PyResult<(Side<'py>, Side<'py>)> {
        let (checkpoints, examples) = match &rows {
            Some(rows) => (rows.shape()[0], rows.shape()[1]),
            None => (1, self.rows.len() as usize),
        };
        let count = queries.shape()[1];
        if queries.shape()[2] != self.dim || queries.shape()[0] != checkpoints {
            let must = format!("[{checkpoints}, queries, {}]", self.dim);
            let got = format!("{:?}", queries.shape());
            return Err(exception(py, &Error::shape("queries", must, got)));
        }
        let rows = numbers_of(py, rows.as_ref())?;
        let queries = queries.as_slice().map_err(|_| not_contiguous(py, "queries"))?;
        let (excluded, segments, sides) = (&excluded, &segments, wanted(sides));
        let norms = match &norms {
            Some(norms) => norms.as_slice().map_err(|_| not_contiguous(py, "norms"))?,
            None => &[],
        };
        let request =
            Request { rows, examples, queries, count, k, sides, excluded, norms, segments };
        let found = compute(py, |asker| search::ends(&self.rows, &request, threads, asker))?;
        Ok((side(py, &found, |ends| &ends.largest)?, side(py, &found, |ends| &ends.smallest)?))
    }
}

impl Rows {
    fn in_memory<T: Element + Copy>(
        py: Python<'_>,
        values: &PyReadonlyArray2<'_, T>,
        shard: impl FnOnce(Vec<T>, usize) -> Shard,
    ) -> PyResult<Self> {
        let (count, dim) = (values.shape()[0], values.shape()[1]);
        let values = values.as_slice().map_err(|_| not_contiguous(py, "matrix"))?.to_vec();
        let shards = vec![shard(values, dim)];
        let rows = search::Rows::new(shards, vec![1.0; count], dim);
        Ok(Self { rows: rows.map_err(|error| exception(py, &error))?, dim })
    }
}

/// Numbers of rows; none for examples that are the rows.
fn numbers_of<'a>(
    py: Python<'_>,
    numbers: Option<&'a PyReadonlyArray2<'_, u64>>,
) -> PyResult<&'a [u64]> {
    match numbers {
        Some(numbers) => numbers.as_slice().map_err(|_| not_contiguous(py, "numbers")),
        None => Ok(&[]),
    }
}

fn wanted((largest, smallest): (bool, bool)) -> Sides {
    Sides { largest, smallest }
}

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Codes {
    codes: Arc<codes::Codes>,
}

#[pymethods]
impl Codes {
    #[new]
    fn new(
        py: Python<'_>,
        rows: &Rows,
        numbers: Option<PyReadonlyArray2<'_, u64>>,
        weights: Vec<f32>,
        norms: PyReadonlyArray1<'_, f32>,
        prefix: Vec<usize>,
        directions: PyReadonlyArray2<'_, f64>,
        seed: u64,
        bits: usize,
        threads: usize,
    ) -> PyResult<Self> {
        let numbers = numbers_of(py, numbers.as_ref())?;
        let norms = norms.as_slice().map_err(|_| not_contiguous(py, "norms"))?;
        let directions = directions.as_slice().map_err(|_| not_contiguous(py, "directions"))?;
        let codes = compute(py, |asker| {
            let bits = match bits {
                4 => Bits::Four,
                8 => Bits::Eight,
                _ => return Err(Error::argument("bits", "4 or 8", bits)),
            };
            let length = weights.len().saturating_mul(rows.dim);
            let rotation = Rotation::new(length, &prefix, directions, seed)?;
            let rows = &rows.rows;
            codes::Codes::new(rows, numbers, &weights, norms, rotation, bits, threads, asker)
        })?;
        Ok(Self { codes: Arc::new(codes) })
    }

    /// What `parts` gave.
    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        length: usize,
        prefix: Vec<usize>,
        directions: PyReadonlyArray2<'_, f64>,
        seed: u64,
        weights: Vec<f32>,
        order: PyReadonlyArray1<'_, u32>,
        segments: Vec<SegmentParts<'_>>,
        reaches: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<Self> {
        let directions = directions.as_slice().map_err(|_| not_contiguous(py, "directions"))?;
        let segments = segments
            .iter()
            .map(|(width, planes, scales, numbers)| {
                let [upper, lower] = planes.each_ref().map(|plane| copied(py, plane));
                let [upper_errors, errors, tails] =
                    numbers.each_ref().map(|numbers| copied(py, numbers));
                let bits = |bits: PyResult<Vec<u16>>| -> PyResult<Vec<bf16>> {
                    Ok(bits?.into_iter().map(bf16::from_bits).collect())
                };
                Ok(Segment {
                    width: *width,
                    upper: Lines::from(&upper?[..]),
                    lower: lower?,
                    scales: copied(py, scales)?,
                    upper_errors: bits(upper_errors)?,
                    errors: bits(errors)?,
                    tails: bits(tails)?,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let (order, reaches) = (copied(py, &order)?, copied(py, &reaches)?);
        let codes = compute(py, |_| {
            let rotation = Rotation::new(length, &prefix, directions, seed)?;
            codes::Codes::from_parts(rotation, weights, order, segments, reaches)
        })?;
        Ok(Self { codes: Arc::new(codes) })
    }

    /// The arrays it is made of: order, segments and reaches.
    fn parts<'py>(&self, py: Python<'py>) -> Parts<'py> {
        let segments = self.codes.segments().iter().map(|segment| {
            let bits = |numbers: &[bf16]| -> Bound<'py, PyArray1<u16>> {
                let bits: Vec<u16> = numbers.iter().map(|number| number.to_bits()).collect();
                bits.into_pyarray(py)
            };
            (
                segment.width,
                [segment.upper.to_pyarray(py), segment.lower.to_pyarray(py)],
                segment.scales.to_pyarray(py),
                [bits(&segment.upper_errors), bits(&segment.errors), bits(&segment.tails)],
            )
        });
        let (order, reaches) = (self.codes.order(), self.codes.reaches());
        (order.to_pyarray(py), segments.collect(), reaches.to_pyarray(py))
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.codes.bytes()
    }

    #[pyo3(signature = (rows, numbers, queries, k, sides, eligible, excluded, candidates, threads))]
    fn search<'py>(
        &self,
        py: Python<'py>,
        rows: &Rows,
        numbers: Option<PyReadonlyArray2<'_, u64>>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        sides: (bool, bool),
        eligible: Option<PyReadonlyArray1<'_, bool>>,
        excluded: Vec<Vec<u64>>,
        candidates: Option<usize>,
        threads: usize,
    ) -> PyResult<Answers<'py>> {
        let count = queries.shape()[1];
        let numbers = numbers_of(py, numbers.as_ref())?;
        let queries = queries.as_slice().map_err(|_| not_contiguous(py, "queries"))?;
        let eligible = match &eligible {
            Some(eligible) => eligible.as_slice().map_err(|_| not_contiguous(py, "eligible"))?,
            None => &[],
        };
        let request = certified::Request {
            rows: &rows.rows,
            numbers,
            queries,
            count,
            k,
            sides: wanted(sides),
            eligible,
            excluded: &excluded,
            candidates,
        };
        let found = compute(py, |asker| certified::search(&self.codes, &request, threads, asker))?;
        answers(py, found)
    }
}

fn answers(py: Python<'_>, found: Vec<certified::Answer>) -> PyResult<Answers<'_>> {
    let count = found.len();
    let scored: Vec<u64> = found.iter().map(|answer| answer.scored as u64).collect();
    let margins: Vec<f32> = found.iter().flat_map(|answer| answer.margins).collect();
    let ends: Vec<Ends> = found.into_iter().map(|answer| answer.ends).collect();
    Ok((
        side(py, &ends, |ends| &ends.largest)?,
        side(py, &ends, |ends| &ends.smallest)?,
        scored.into_pyarray(py),
        margins.into_pyarray(py).reshape([count, 2])?,
    ))
}

/// Width, planes, scales and bounds.
type SegmentParts<'py> = (
    usize,
    [PyReadonlyArray1<'py, u8>; 2],
    PyReadonlyArray1<'py, f32>,
    [PyReadonlyArray1<'py, u16>; 3],
);
type SegmentArrays<'py> = (
    usize,
    [Bound<'py, PyArray1<u8>>; 2],
    Bound<'py, PyArray1<f32>>,
    [Bound<'py, PyArray1<u16>>; 3],
);
type Parts<'py> = (Bound<'py, PyArray1<u32>>, Vec<SegmentArrays<'py>>, Bound<'py, PyArray1<f32>>);

fn copied<T: Element + Copy>(py: Python<'_>, array: &PyReadonlyArray1<'_, T>) -> PyResult<Vec<T>> {
    Ok(array.as_slice().map_err(|_| not_contiguous(py, "parts"))?.to_vec())
}

type Answers<'py> = (Side<'py>, Side<'py>, Bound<'py, PyArray1<u64>>, Bound<'py, PyArray2<f32>>);

/// One side of all queries, as wide as the shortest list.
fn side<'py>(
    py: Python<'py>,
    found: &[Ends],
    pick: impl Fn(&Ends) -> &Vec<Hit>,
) -> PyResult<Side<'py>> {
    let width = found.iter().map(|ends| pick(ends).len()).min().unwrap_or(0);
    let hits = || found.iter().flat_map(|ends| &pick(ends)[..width]);
    let examples: Vec<u64> = hits().map(|hit| hit.example).collect();
    let scores: Vec<f32> = hits().map(|hit| hit.score).collect();
    let shape = [found.len(), width];
    Ok((examples.into_pyarray(py).reshape(shape)?, scores.into_pyarray(py).reshape(shape)?))
}

/// Examples may be added and deleted while others search: they wait for each other.
#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Graph {
    graph: RwLock<graph::Graph>,
}

type GraphParts<'py> = (
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<bool>>,
);

#[pymethods]
impl Graph {
    #[new]
    fn new(
        py: Python<'_>,
        codes: &Codes,
        norms: PyReadonlyArray1<'_, f32>,
        seed: u64,
        threads: usize,
    ) -> PyResult<Self> {
        let norms = copied(py, &norms)?;
        let codes = Arc::clone(&codes.codes);
        let graph = compute(py, |asker| graph::Graph::new(codes, norms, seed, threads, asker))?;
        Ok(Self { graph: RwLock::new(graph) })
    }

    /// What `parts` gave.
    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        codes: &Codes,
        norms: PyReadonlyArray1<'_, f32>,
        links: PyReadonlyArray1<'_, u32>,
        entries: PyReadonlyArray1<'_, u32>,
        deleted: PyReadonlyArray1<'_, bool>,
    ) -> PyResult<Self> {
        let parts = graph::Parts {
            norms: copied(py, &norms)?,
            links: copied(py, &links)?,
            entries: copied(py, &entries)?,
            deleted: copied(py, &deleted)?,
        };
        let codes = Arc::clone(&codes.codes);
        let graph = compute(py, |_| graph::Graph::from_parts(codes, parts))?;
        Ok(Self { graph: RwLock::new(graph) })
    }

    /// The arrays it is made of beside its codes: norms, links, entries, deleted.
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<GraphParts<'py>> {
        let parts = self.read(py, graph::Graph::parts)?;
        Ok((
            parts.norms.into_pyarray(py),
            parts.links.into_pyarray(py),
            parts.entries.into_pyarray(py),
            parts.deleted.into_pyarray(py),
        ))
    }

    #[pyo3(signature = (rows, numbers, queries, k, width, eligible, excluded, candidates, threads))]
    fn search<'py>(
        &self,
        py: Python<'py>,
        rows: &Rows,
        numbers: Option<PyReadonlyArray2<'_, u64>>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        width: usize,
        eligible: Option<PyReadonlyArray1<'_, bool>>,
        excluded: Vec<Vec<u64>>,
        candidates: Option<usize>,
        threads: usize,
    ) -> PyResult<Answers<'py>> {
        let count = queries.shape()[1];
        let numbers = numbers_of(py, numbers.as_ref())?;
        let queries = queries.as_slice().map_err(|_| not_contiguous(py, "queries"))?;
        let eligible = match &eligible {
            Some(eligible) => eligible.as_slice().map_err(|_| not_contiguous(py, "eligible"))?,
            None => &[],
        };
        let request = certified::Request {
            rows: &rows.rows,
            numbers,
            queries,
            count,
            k,
            sides: wanted((true, false)),
            eligible,
            excluded: &excluded,
            candidates,
        };
        let found = compute(py, |asker| {
            let graph = self.graph.read().unwrap_or_else(PoisonError::into_inner);
            graph.search(&request, width, threads, asker)
        })?;
        answers(py, found)
    }

    fn add(
        &self,
        py: Python<'_>,
        codes: &Codes,
        norms: PyReadonlyArray1<'_, f32>,
        seed: u64,
        threads: usize,
    ) -> PyResult<()> {
        let norms = copied(py, &norms)?;
        compute(py, |asker| {
            let mut graph = self.graph.write().unwrap_or_else(PoisonError::into_inner);
            graph.add(&codes.codes, &norms, seed, threads, asker)
        })
    }

    fn delete(&self, py: Python<'_>, examples: PyReadonlyArray1<'_, u64>) -> PyResult<()> {
        let examples = copied(py, &examples)?;
        compute(py, |_| {
            self.graph.write().unwrap_or_else(PoisonError::into_inner).delete(&examples)
        })
    }

    #[getter]
    fn codes(&self, py: Python<'_>) -> PyResult<Codes> {
        Ok(Codes { codes: self.read(py, |graph| Arc::clone(graph.codes()))? })
    }

    #[getter]
    fn bytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.read(py, graph::Graph::bytes)
    }

    #[getter]
    fn norm_spread(&self, py: Python<'_>) -> PyResult<f32> {
        self.read(py, graph::Graph::norm_spread)
    }

    fn digest(&self, py: Python<'_>) -> PyResult<u64> {
        self.read(py, graph::Graph::digest)
    }
}

impl Graph {
    /// Without the GIL: whoever writes may hold the lock for long.
    fn read<T: Send>(
        &self,
        py: Python<'_>,
        of: impl FnOnce(&graph::Graph) -> T + Send,
    ) -> PyResult<T> {
        // A change that failed has changed nothing, so a poisoned lock guards a whole graph.
        compute(py, |_| Ok(of(&self.graph.read().unwrap_or_else(PoisonError::into_inner))))
    }
}
