//! Python bindings of whence-core: arrays in, arrays out, no arithmetic.

#![allow(missing_docs)] // what Python sees is documented in `_core.pyi`

mod boundary;
mod hash;
mod norms;
mod search;
mod sketch;
mod store;
mod text;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use super::hash::{
        Hash, HashIndex, code_similarities, duplicate_groups, graph_by_codes, graph_within_batches,
        shuffled,
    };
    #[pymodule_export]
    use super::norms::norm_gradients;
    #[pymodule_export]
    use super::search::{Codes, Graph, Rows};
    #[pymodule_export]
    use super::sketch::{Sketch, instruction_set};
    #[pymodule_export]
    use super::store::{block_checksums, check_file, crc32, encode, encode_factors, quantise};
    #[pymodule_export]
    use super::text::InvertedIndex;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("BLOCK", whence_core::store::blocks::BLOCK)?;
        module.add("HASH_VERSION", whence_core::random::HASH_VERSION)?;
        module.add("MAX_COORDINATES", whence_core::sketch::MAX_COORDINATES)?;
        module.add("MAX_DIM", whence_core::sketch::MAX_DIM)?;
        module.add("MAX_HASHES", whence_core::hash::family::MAX_HASHES)?;
        module.add("MAX_LEVELS", whence_core::hash::family::MAX_LEVELS)?;
        module.add("MAX_PAIRS", whence_core::hash::pairs::MAX_PAIRS)?;
        module.add("MAX_PROBES", whence_core::hash::index::MAX_PROBES)?;
        module.add("MAX_BATCH", whence_core::hash::graph::MAX_BATCH)?;
        module.add("MAX_VIEWS", whence_core::hash::graph::MAX_VIEWS)?;
        module.add("MAX_THREADS", whence_core::parallel::MAX_THREADS)
    }
}
