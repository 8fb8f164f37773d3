//! `whence._core.InvertedIndex`.

use numpy::{IntoPyArray, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use whence_core::text::index::Request;
use whence_core::text::{Index, Texts, Weighting};

use crate::boundary::{compute, values_if_any, values_of};

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct InvertedIndex {
    index: Index,
}

type Hits<'py> = (Bound<'py, PyArray2<u64>>, Bound<'py, PyArray2<f32>>);

#[pymethods]
impl InvertedIndex {
    #[new]
    fn new(py: Python<'_>, bm25: Option<(f64, f64)>) -> PyResult<Self> {
        let weighting = match bm25 {
            None => Weighting::TfIdf,
            Some((k1, b)) => Weighting::Bm25 { k1, b },
        };
        Ok(Self { index: compute(py, |_| Index::new(weighting))? })
    }

    /// This and more documents.
    fn appended(
        &self,
        py: Python<'_>,
        tokens: PyReadonlyArray1<'_, u32>,
        starts: PyReadonlyArray1<'_, u64>,
        threads: usize,
    ) -> PyResult<Self> {
        let (tokens, starts) =
            (values_of(py, "tokens", &tokens)?, values_of(py, "starts", &starts)?);
        let index =
            compute(py, |asker| self.index.appended(Texts::new(tokens, starts)?, threads, asker))?;
        Ok(Self { index })
    }

    fn __len__(&self) -> usize {
        self.index.postings().len()
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.index.bytes()
    }

    fn search<'py>(
        &self,
        py: Python<'py>,
        tokens: PyReadonlyArray1<'_, u32>,
        starts: PyReadonlyArray1<'_, u64>,
        k: usize,
        eligible: Option<PyReadonlyArray1<'_, bool>>,
        threads: usize,
    ) -> PyResult<Hits<'py>> {
        let (tokens, starts) =
            (values_of(py, "tokens", &tokens)?, values_of(py, "starts", &starts)?);
        let eligible = values_if_any(py, "eligible", eligible.as_ref())?;
        let found = compute(py, |asker| {
            let request = Request { queries: Texts::new(tokens, starts)?, k, eligible };
            self.index.search(&request, threads, asker)
        })?;
        // As many for each query: those that are eligible, if they are fewer than k.
        let shape = [found.len(), found.first().map_or(0, Vec::len)];
        let hits = || found.iter().flatten();
        let documents: Vec<u64> = hits().map(|hit| hit.example).collect();
        let scores: Vec<f32> = hits().map(|hit| hit.score).collect();
        Ok((documents.into_pyarray(py).reshape(shape)?, scores.into_pyarray(py).reshape(shape)?))
    }

    fn scores<'py>(
        &self,
        py: Python<'py>,
        tokens: PyReadonlyArray1<'_, u32>,
        starts: PyReadonlyArray1<'_, u64>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let (tokens, starts) =
            (values_of(py, "tokens", &tokens)?, values_of(py, "starts", &starts)?);
        let scores =
            compute(py, |asker| self.index.scores(Texts::new(tokens, starts)?, threads, asker))?;
        scores.into_pyarray(py).reshape([starts.len() - 1, self.index.postings().len()])
    }
}
