//! `whence._core.Rows`.

use std::path::PathBuf;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use numpy::{
    Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::kernels::Lines;
use whence_core::memory;
use whence_core::search::certified;
use whence_core::search::codes::{self, Bits, Segment};
use whence_core::search::rotation::Rotation;
use whence_core::search::{self, Ends, Hit, Request, Sides, graph};
use whence_core::store::{Kind, Shard};

use crate::boundary::{compute, compute_alone, copied, exception, values_if_any, values_of};

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
        "int4" => Ok(Kind::I4),
        "int2" => Ok(Kind::I2),
        "int1" => Ok(Kind::I1),
        _ => Err(Error::argument("dtype", "float32, float16, int8, int4, int2 or int1", dtype)),
    }
}

#[pymethods]
impl Rows {
    #[new]
    #[pyo3(signature = (files, dim, dtype, scales, memory_map=false))]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, u64, u64, Option<PyReadonlyArray1<'_, u32>>)>,
        dim: usize,
        dtype: &str,
        scales: PyReadonlyArray1<'_, f32>,
        memory_map: bool,
    ) -> PyResult<Self> {
        let scales = copied(py, "scales", &scales)?;
        let mut all = Vec::with_capacity(files.len());
        for (path, offset, rows, checksums) in files {
            let checksums = checksums.as_ref().map(|values| copied(py, "checksums", values));
            all.push((path, offset, rows, checksums.transpose()?));
        }
        let rows = compute_alone(py, |watch| {
            let kind = kind_of(dtype)?;
            let files: Result<Vec<_>, _> = all
                .into_iter()
                .map(|(path, offset, rows, checksums)| {
                    watch.check()?;
                    let shard = Shard::in_file(&path, offset, rows, dim, kind, checksums)?;
                    if memory_map { shard.mapped() } else { Ok(shard) }
                })
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
        let numbers = values_of(py, "numbers", &numbers)?;
        let values = compute_alone(py, |watch| self.rows.scaled(numbers, watch))?;
        values.into_pyarray(py).reshape([numbers.len(), self.dim])
    }

    /// The rows of some numbers, in memory.
    fn gathered(&self, py: Python<'_>, numbers: PyReadonlyArray1<'_, u64>) -> PyResult<Self> {
        let numbers = values_of(py, "numbers", &numbers)?;
        let rows = compute_alone(py, |watch| self.rows.gathered(numbers, watch))?;
        Ok(Self { rows, dim: self.dim })
    }

    fn norms<'py>(&self, py: Python<'py>, threads: usize) -> PyResult<Bound<'py, PyArray1<f32>>> {
        Ok(compute(py, |asker| self.rows.norms(threads, asker))?.into_pyarray(py))
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.rows.bytes()
    }

    /// What tells the first `count` examples from others.
    fn digest(
        &self,
        py: Python<'_>,
        numbers: Option<PyReadonlyArray2<'_, u64>>,
        count: usize,
        threads: usize,
    ) -> PyResult<u64> {
        let shape = match &numbers {
            Some(numbers) => (numbers.shape()[0], numbers.shape()[1]),
            None => (1, self.rows.len() as usize),
        };
        let numbers = values_if_any(py, "numbers", numbers.as_ref())?;
        Ok(compute(py, |asker| self.rows.digest(numbers, shape, count, threads, asker))?.0)
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
        let rows = values_if_any(py, "rows", rows.as_ref())?;
        let queries = values_of(py, "queries", &queries)?;
        let (excluded, segments, sides) = (&excluded, &segments, wanted(sides));
        let norms = values_if_any(py, "norms", norms.as_ref())?;
        let request =
            Request { rows, examples, queries, count, k, sides, excluded, norms, segments };
        let found = compute(py, |asker| search::ends(&self.rows, &request, threads, asker))?;
        both(py, found)
    }
}

impl Rows {
    fn in_memory<T: Element + Copy + Send + Sync>(
        py: Python<'_>,
        values: &PyReadonlyArray2<'_, T>,
        shard: impl FnOnce(Vec<T>, usize) -> Shard,
    ) -> PyResult<Self> {
        let (count, dim) = (values.shape()[0], values.shape()[1]);
        let values = copied(py, "matrix", values)?;
        let shards = vec![shard(values, dim)];
        let rows = search::Rows::new(shards, vec![1.0; count], dim);
        Ok(Self { rows: rows.map_err(|error| exception(py, &error))?, dim })
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
        let numbers = values_if_any(py, "numbers", numbers.as_ref())?;
        let norms = values_of(py, "norms", &norms)?;
        let directions = values_of(py, "directions", &directions)?;
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
        digest: u64,
    ) -> PyResult<Self> {
        let directions = values_of(py, "directions", &directions)?;
        let segments = segments
            .iter()
            .map(|(width, planes, scales, numbers)| {
                let [upper, lower] = planes.each_ref().map(|plane| values_of(py, "parts", plane));
                let [upper_errors, errors, tails] =
                    numbers.each_ref().map(|numbers| copied(py, "parts", numbers));
                let bits = |bits: PyResult<Vec<u16>>| Ok::<_, PyErr>(bits?.reinterpret_into());
                let (upper, lower) = (upper?, lower?);
                let (upper, lower) = compute_alone(py, |watch| {
                    Ok((Lines::joined(&[upper], watch)?, memory::copied(lower, watch)?))
                })?;
                Ok(Segment {
                    width: *width,
                    upper,
                    lower,
                    scales: copied(py, "parts", scales)?,
                    upper_errors: bits(upper_errors)?,
                    errors: bits(errors)?,
                    tails: bits(tails)?,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let (order, reaches) = (copied(py, "parts", &order)?, copied(py, "parts", &reaches)?);
        let codes = compute_alone(py, |watch| {
            let rotation = Rotation::new(length, &prefix, directions, seed)?;
            codes::Codes::from_parts(
                rotation,
                weights,
                order,
                segments,
                reaches,
                search::Digest(digest),
                watch,
            )
        })?;
        Ok(Self { codes: Arc::new(codes) })
    }

    /// The arrays it is made of: order, segments and reaches.
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Parts<'py>> {
        let segments = self.codes.segments().iter().map(|segment| {
            let bits = |numbers: &[bf16]| array_of::<u16>(py, numbers.reinterpret_cast());
            Ok((
                segment.width,
                [array_of(py, &segment.upper)?, array_of(py, &segment.lower)?],
                array_of(py, &segment.scales)?,
                [bits(&segment.upper_errors)?, bits(&segment.errors)?, bits(&segment.tails)?],
            ))
        });
        let segments = segments.collect::<PyResult<_>>()?;
        Ok((array_of(py, self.codes.order())?, segments, array_of(py, self.codes.reaches())?))
    }

    /// What tells the rows that they are of from others.
    #[getter]
    fn digest(&self) -> u64 {
        self.codes.digest().0
    }

    /// These and the codes of more examples.
    fn appended(&self, py: Python<'_>, more: &Codes) -> PyResult<Self> {
        let codes = compute_alone(py, |watch| self.codes.appended(&more.codes, watch))?;
        Ok(Self { codes: Arc::new(codes) })
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
        let request = certified::Request {
            rows: &rows.rows,
            numbers: values_if_any(py, "numbers", numbers.as_ref())?,
            queries: values_of(py, "queries", &queries)?,
            count: queries.shape()[1],
            k,
            sides: wanted(sides),
            eligible: values_if_any(py, "eligible", eligible.as_ref())?,
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
    let (largest, smallest) = both(py, ends)?;
    Ok((largest, smallest, scored.into_pyarray(py), margins.into_pyarray(py).reshape([count, 2])?))
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

/// A copy of values as an array.
fn array_of<'py, T: Element + Copy + Send + Sync>(
    py: Python<'py>,
    values: &[T],
) -> PyResult<Bound<'py, PyArray1<T>>> {
    Ok(compute_alone(py, |watch| memory::copied(values, watch))?.into_pyarray(py))
}

type Answers<'py> = (Side<'py>, Side<'py>, Bound<'py, PyArray1<u64>>, Bound<'py, PyArray2<f32>>);

/// Both sides of all queries.
fn both(py: Python<'_>, found: Vec<Ends>) -> PyResult<(Side<'_>, Side<'_>)> {
    let largest = side(py, &found, |ends| &ends.largest)?;
    let smallest = side(py, &found, |ends| &ends.smallest)?;
    // To give hundreds of MiB back takes as long as an interrupt may at most.
    compute_alone(py, |watch| found.into_iter().try_for_each(|_| watch.check()))?;
    Ok((largest, smallest))
}

/// One side of all queries, as wide as the shortest list.
fn side<'py>(
    py: Python<'py>,
    found: &[Ends],
    pick: impl Fn(&Ends) -> &Vec<Hit> + Sync,
) -> PyResult<Side<'py>> {
    let width = found.iter().map(|ends| pick(ends).len()).min().unwrap_or(0);
    let (examples, scores) = compute_alone(py, |watch| {
        let room = found.len() * width;
        let mut sides: (Vec<u64>, Vec<f32>) = (Vec::with_capacity(room), Vec::with_capacity(room));
        for ends in found {
            watch.check()?;
            sides.extend(pick(ends)[..width].iter().map(|hit| (hit.example, hit.score)));
        }
        Ok(sides)
    })?;
    let shape = [found.len(), width];
    Ok((examples.into_pyarray(py).reshape(shape)?, scores.into_pyarray(py).reshape(shape)?))
}

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Graph {
    graph: graph::Graph,
}

type GraphParts<'py> =
    (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<u32>>);

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
        let norms = copied(py, "norms", &norms)?;
        let codes = Arc::clone(&codes.codes);
        let graph = compute(py, |asker| graph::Graph::new(codes, norms, seed, threads, asker))?;
        Ok(Self { graph })
    }

    /// What `parts` gave.
    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        codes: &Codes,
        norms: PyReadonlyArray1<'_, f32>,
        links: PyReadonlyArray1<'_, u32>,
        entries: PyReadonlyArray1<'_, u32>,
    ) -> PyResult<Self> {
        let parts = graph::Parts {
            norms: copied(py, "norms", &norms)?,
            links: copied(py, "links", &links)?,
            entries: copied(py, "entries", &entries)?,
        };
        let codes = Arc::clone(&codes.codes);
        let graph = compute_alone(py, |watch| graph::Graph::from_parts(codes, parts, watch))?;
        Ok(Self { graph })
    }

    /// The arrays it is made of beside its codes: norms, links, entries.
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<GraphParts<'py>> {
        let graph::Parts { norms, links, entries } =
            compute_alone(py, |watch| self.graph.parts(watch))?;
        Ok((norms.into_pyarray(py), links.into_pyarray(py), entries.into_pyarray(py)))
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
        let request = certified::Request {
            rows: &rows.rows,
            numbers: values_if_any(py, "numbers", numbers.as_ref())?,
            queries: values_of(py, "queries", &queries)?,
            count: queries.shape()[1],
            k,
            sides: wanted((true, false)),
            eligible: values_if_any(py, "eligible", eligible.as_ref())?,
            excluded: &excluded,
            candidates,
        };
        let found = compute(py, |asker| self.graph.search(&request, width, threads, asker))?;
        answers(py, found)
    }

    /// A graph with more examples.
    fn grown(
        &self,
        py: Python<'_>,
        codes: &Codes,
        norms: PyReadonlyArray1<'_, f32>,
        seed: u64,
        threads: usize,
    ) -> PyResult<Self> {
        let norms = values_of(py, "norms", &norms)?;
        let graph =
            compute(py, |asker| self.graph.grown(&codes.codes, norms, seed, threads, asker))?;
        Ok(Self { graph })
    }

    #[getter]
    fn codes(&self) -> Codes {
        Codes { codes: Arc::clone(self.graph.codes()) }
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.graph.bytes()
    }

    #[getter]
    fn norm_spread(&self) -> f32 {
        self.graph.norm_spread()
    }

    fn digest(&self, py: Python<'_>) -> PyResult<u64> {
        compute_alone(py, |watch| self.graph.digest(watch))
    }
}
