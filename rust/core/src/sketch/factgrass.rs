//! `factgrass`: some rows and columns of a matrix are kept, and what is in both is sketched.
//!
//! Of the rows of a parameter `min(rows, s)` are kept and of its columns `min(columns, s)`, with
//! `s = ceil(sqrt(4 dim))`: one of each stratum, times the root of the stratum's size, as `grass`
//! keeps coordinates. The kept matrix goes through the map of `chunked_sjlt`. Inner products are
//! unbiased. With `p = x y` value by value, strata `a` of `n_a` rows and `b` of `n_b` columns, and
//! a stratum in place of an index for the sum over it, the variance is, for the choice of the kept,
//!
//! ```text
//!   sum over a, b != c of (n_a sum over i in a of p_ib p_ic  -  p_ab p_ac)
//! + sum over b, a != d of (n_b sum over j in b of p_aj p_dj  -  p_ab p_db)
//! + sum over a, b      of (n_a n_b sum over i in a, j in b of p_ij^2  -  p_ab^2)
//! ```
//!
//! and for the sketch `1/dim` of the sum, over entries `(a, b)` and `(d, c)` of the kept matrix in
//! different chunks, of the mean of `x_ab^2 y_dc^2 + p_ab p_dc` over all choices: for `d != a` and
//! `c != b` that is what stands there, and for `d = a` it is
//! `n_a sum over i in a of (x_ib^2 y_ic^2 + p_ib p_ic)`, and so for `c = b`.
//!
//! A vector has one side only: its map is that of `grass`.
//!
//! If values are spread as independent normal numbers are, this is about
//! `(1/dim + 1/(m_left m_right) - 1/n) (|x|^2 |y|^2 + (x.y)^2)` for the numbers `m` of what is kept
//! and `n` values. But matrices of rank one are seen through `m_left` rows and `m_right` columns
//! alone, as those of `kronecker` through its projections: of length 1 they have a choice with the
//! second moment of about `(a^2 + (1 + a^2) / m_left) (b^2 + (1 + b^2) / m_right)` for the cosines
//! `a` and `b` of the sides, less where much of a side is kept, and more if its values are uneven.
//! As that of `chunked_sjlt`, the law of the sketch holds for a `dim` of at least 16.
//!
//! Most values are never looked at, so one that is NaN or infinite need not be noticed.
//!
//! (Hu et al., "`GraSS`: scalable data attribution with gradient sparsification and sparse
//! projection", arXiv 2505.18976, section 3: its form for linear layers. What differs is what
//! differs in `grass`.)

use std::sync::Mutex;

use super::factors::COLUMNS;
use super::grass::{Choice, Kept, add_kept};
use super::outer::{Block, Sequences};
use super::slab::Slab;
use super::{Kind, Parameter, Row, Sketch, join};
use crate::error::Error;
use crate::kernels::{Column, LANES};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// The first counter of the choice of columns; that of rows begins at [`COLUMNS`], far from the
/// slots of the chunked map.
const RIGHT: u64 = COLUMNS | 1 << 62;

/// The kept rows and columns of a parameter.
struct Sides {
    left: Choice,
    right: Choice,
    /// The kept matrix, as a parameter of a chunked sketch.
    matrix: Parameter,
}

impl Sides {
    fn of(sketch: &Sketch, parameter: Parameter) -> Self {
        let Parameter { key, len, columns } = parameter;
        let square = 4 * sketch.dim as u64;
        let most = (square - 1).isqrt() + 1;
        let left = Choice::new(key, COLUMNS, len / columns, most);
        let right = Choice::new(key, RIGHT, columns, most);
        let (rows, columns) = (left.count(), right.count());
        Self { left, right, matrix: Parameter { key, len: rows * columns, columns } }
    }
}

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    watch.check()?;
    let Sides { left, right, matrix } = Sides::of(sketch, parameter);
    let columns = parameter.columns;
    let (start, end) = (piece.start, piece.start + piece.values.width() as u64);
    let mut kept = Vec::new();
    let some = left.chosen(start / columns..end.div_ceil(columns));
    for (a, (row, row_weight)) in some.clone().zip(left.all(some)) {
        let from = start.saturating_sub(row * columns).min(columns);
        let to = (end - row * columns).min(columns);
        let some = right.chosen(from..to);
        for (b, (column, column_weight)) in some.clone().zip(right.all(some)) {
            let place = a * matrix.columns + b;
            let slot = sketch.slot(matrix, place / LANES as u64);
            let lane = place as usize % LANES;
            let bucket = slot.bucket(lane, sketch.dim);
            kept.push(Kept {
                coordinate: row * columns + column,
                column: Column::default().moved(bucket as u32, slot.signs() >> lane & 1 == 1),
                weight: row_weight * column_weight,
            });
        }
    }
    add_kept(&kept, piece, rows)
}

/// What is kept of one side of a block: which columns of the factors, and their weights.
fn some(choice: Choice, first: u64, count: usize) -> (u64, Vec<(usize, f32)>) {
    let strata = choice.chosen(first..first + count as u64);
    let chosen = choice.all(strata.clone());
    (strata.start, chosen.map(|(at, weight)| ((at - first) as usize, weight as f32)).collect())
}

fn view(values: &[f32], batch: usize, terms: usize, width: usize) -> Sequences<'_> {
    Sequences { values, shape: [batch, terms, width], strides: [terms * width, width, 1] }
}

/// Puts the kept columns of a sample's factors into `values`, `[term, kept]`.
fn gather(factors: Sequences<'_>, sample: usize, kept: &[(usize, f32)], values: &mut [f32]) {
    for (term, values) in values.chunks_exact_mut(kept.len()).enumerate() {
        for (value, &(at, weight)) in values.iter_mut().zip(kept) {
            *value = factors.at(sample, term, at) * weight;
        }
    }
}

/// Adds the outer products of a block that begins with row `first`: those of what is kept of the
/// factors, by the chunked sketch.
pub(super) fn add_outer(
    sketch: &Sketch,
    block: Block<'_>,
    first: u64,
    totals: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    /// Kept values of factors at a time, unless one sample has more: 16 MiB.
    const VALUES: usize = 1 << 22;
    let terms = block.terms();
    let chunked = Sketch { kind: Kind::ChunkedSjlt, ..*sketch };
    let sides = Sides::of(sketch, block.parameter);
    let (row, rows) = some(sides.left, first, block.rows());
    let (_, columns) = some(sides.right, 0, block.columns());
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let most = (VALUES / (terms * (rows.len() + columns.len()))).max(1);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut bad = Vec::new();
    for (from, totals) in (0..).step_by(most).zip(totals.chunks(most)) {
        let batch = totals.len();
        left.resize(batch * terms * rows.len(), 0.0);
        right.resize(batch * terms * columns.len(), 0.0);
        let parts = left.chunks_exact_mut(terms * rows.len());
        let parts = parts.zip(right.chunks_exact_mut(terms * columns.len()));
        let parts: Vec<_> = parts.map(Mutex::new).collect();
        share(
            batch,
            threads,
            asker,
            || (),
            |(), sample, _| {
                let mut part = parts[sample].lock().map_err(Error::panicked)?;
                gather(block.left, from + sample, &rows, part.0);
                gather(block.right, from + sample, &columns, part.1);
                Ok(())
            },
        )?;
        drop(parts);
        let block = Block {
            parameter: sides.matrix,
            start: row * sides.matrix.columns,
            left: view(&left, batch, terms, rows.len()),
            right: view(&right, batch, terms, columns.len()),
            bias: None,
        };
        let here = chunked.add_block(block, totals, None, threads, asker)?;
        bad.push(here.into_iter().map(|sample| from + sample).collect());
    }
    Ok(join(bad))
}
