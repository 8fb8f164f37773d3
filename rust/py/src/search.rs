//! `whence._core.Rows`.

use std::path::PathBuf;

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::search::certified;
use whence_core::search::codes::{self, Bits};
use whence_core::search::rotation::Rotation;
use whence_core::search::{self, Ends, Hit, Request, Sides};
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

    fn read<'py>(
        &self,
        py: Python<'py>,
        numbers: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let numbers = numbers.as_slice().map_err(|_| not_contiguous(py, "numbers"))?;
        let values = compute(py, |_| self.rows.scaled(numbers))?;
        values.into_pyarray(py).reshape([numbers.len(), self.dim])
    }

    #[pyo3(signature = (rows, queries, k, sides, excluded, threads, segments=vec![]))]
    fn ends<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray2<'_, u64>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        sides: (bool, bool),
        excluded: Vec<Vec<u64>>,
        threads: usize,
        segments: Vec<(usize, usize)>,
    ) -> PyResult<(Side<'py>, Side<'py>)> {
        let (examples, count) = (rows.shape()[1], queries.shape()[1]);
        if queries.shape()[2] != self.dim || queries.shape()[0] != rows.shape()[0] {
            let must = format!("[{}, queries, {}]", rows.shape()[0], self.dim);
            let got = format!("{:?}", queries.shape());
            return Err(exception(py, &Error::shape("queries", must, got)));
        }
        let rows = rows.as_slice().map_err(|_| not_contiguous(py, "rows"))?;
        let queries = queries.as_slice().map_err(|_| not_contiguous(py, "queries"))?;
        let (excluded, segments, sides) = (&excluded, &segments, wanted(sides));
        let request = Request { rows, examples, queries, count, k, sides, excluded, segments };
        let found = compute(py, |asker| search::ends(&self.rows, &request, threads, asker))?;
        Ok((side(py, &found, |ends| &ends.largest)?, side(py, &found, |ends| &ends.smallest)?))
    }
}

fn wanted((largest, smallest): (bool, bool)) -> Sides {
    Sides { largest, smallest }
}

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Codes {
    codes: codes::Codes,
}

#[pymethods]
impl Codes {
    #[new]
    fn new(
        py: Python<'_>,
        rows: &Rows,
        numbers: PyReadonlyArray2<'_, u64>,
        weights: Vec<f32>,
        norms: PyReadonlyArray1<'_, f32>,
        prefix: Vec<usize>,
        directions: PyReadonlyArray2<'_, f64>,
        seed: u64,
        bits: usize,
        threads: usize,
    ) -> PyResult<Self> {
        let numbers = numbers.as_slice().map_err(|_| not_contiguous(py, "numbers"))?;
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
        Ok(Self { codes })
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
        numbers: PyReadonlyArray2<'_, u64>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        sides: (bool, bool),
        eligible: Option<PyReadonlyArray1<'_, bool>>,
        excluded: Vec<Vec<u64>>,
        candidates: Option<usize>,
        threads: usize,
    ) -> PyResult<Answers<'py>> {
        let count = queries.shape()[1];
        let numbers = numbers.as_slice().map_err(|_| not_contiguous(py, "numbers"))?;
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
