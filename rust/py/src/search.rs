//! `whence._core.Rows`.

use std::path::PathBuf;

use numpy::{
    IntoPyArray, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::search::{self, Ends, Hit, Request};
use whence_core::store::RowFile;

use crate::boundary::{compute, exception, not_contiguous};

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Rows {
    rows: search::Rows,
    dim: usize,
}

type Side<'py> = (Bound<'py, PyArray2<u64>>, Bound<'py, PyArray2<f32>>);

#[pymethods]
impl Rows {
    #[new]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, u64, u64)>,
        dim: usize,
        half: bool,
        scales: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<Self> {
        let scales = scales.as_slice().map_err(|_| not_contiguous(py, "scales"))?.to_vec();
        let rows = compute(py, |_| {
            let files: Result<Vec<_>, _> = files
                .iter()
                .map(|(path, offset, rows)| RowFile::new(path, *offset, *rows, dim, half))
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

    #[pyo3(signature = (rows, queries, k, excluded, threads, segments=vec![]))]
    fn ends<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray2<'_, u64>,
        queries: PyReadonlyArray3<'_, f32>,
        k: usize,
        excluded: Vec<Vec<u64>>,
        threads: usize,
        segments: Vec<(usize, usize)>,
    ) -> PyResult<(Side<'py>, Side<'py>)> {
        let (examples, count) = (rows.shape()[1], queries.shape()[1]);
        if queries.shape()[2] != self.dim || queries.shape()[0] != rows.shape()[0] {
            let must = format!("[{}, queries, {}]", rows.shape()[0], self.dim);
            let got = format!("{:?}", queries.shape());
            return Err(exception(py, &whence_core::error::Error::shape("queries", must, got)));
        }
        let rows = rows.as_slice().map_err(|_| not_contiguous(py, "rows"))?;
        let queries = queries.as_slice().map_err(|_| not_contiguous(py, "queries"))?;
        let (excluded, segments) = (&excluded, &segments);
        let request = Request { rows, examples, queries, count, k, excluded, segments };
        let found = compute(py, |asker| search::ends(&self.rows, &request, threads, asker))?;
        Ok((side(py, &found, |ends| &ends.largest)?, side(py, &found, |ends| &ends.smallest)?))
    }
}

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
