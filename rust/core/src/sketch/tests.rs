//! The sketch against its definition, written out coordinate by coordinate in f64.

use proptest::prelude::*;

use super::*;
use crate::stop::{Asker, never};

fn defined(sketch: &Sketch, parameter: Parameter, gradient: &[f64]) -> Vec<f64> {
    let mut row = vec![0.0; sketch.dim()];
    for (index, value) in gradient.iter().enumerate() {
        let slot = sketch.slot(parameter, (index / LANES) as u64);
        let lane = index % LANES;
        let sign = if slot.signs() >> lane & 1 == 1 { -1.0 } else { 1.0 };
        let (offset, dim) = (slot.offset() as usize, sketch.dim());
        let ring = if dim % 16 == 0 { dim } else { (dim / 16).saturating_sub(1) * 16 };
        let bucket = if offset < ring {
            offset ^ lane
        } else {
            ring + (offset - ring + lane) % (dim - ring)
        };
        row[bucket] += sign * value;
    }
    row
}

fn chunked(dim: usize, seed: u64) -> Sketch {
    Sketch::new(Kind::ChunkedSjlt, dim, seed).unwrap()
}

/// `add_flat` of an array that lies row after row, into totals that are just as wide.
pub(super) fn flat(
    sketch: &Sketch,
    parameter: Parameter,
    start: u64,
    values: &[f32],
    totals: &mut [f64],
    threads: usize,
) -> Vec<usize> {
    let batch = totals.len() / sketch.dim();
    let rows: Vec<&[f32]> = match values.len() / batch {
        0 => vec![&[]; batch],
        width => values.chunks(width).collect(),
    };
    let totals = Totals::new(totals, sketch.dim(), 0);
    let asker = Asker::new(&never);
    sketch.add_flat(parameter, start, Matrix::new(&rows).unwrap(), totals, threads, &asker).unwrap()
}

pub(super) fn random(seed: u64, len: usize) -> Vec<f32> {
    let bits = |i| (random::value(seed, i as u64) >> 40) as f32;
    (0..len).map(|i| bits(i) / 8_388_608.0 - 1.0).collect()
}

pub(super) fn close(found: &[f64], expected: &[f64], scale: f64) {
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-5 * scale, "{found} {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn flat_follows_the_definition(
        dim in 1usize..80, len in 0usize..400, batch in 1usize..4, seed in any::<u64>(),
    ) {
        let sketch = chunked(dim, seed);
        let parameter = sketch.parameter("w", &[len as u64]).unwrap();
        let values = random(seed, batch * len);
        let mut totals = vec![0.0; batch * dim];
        flat(&sketch, parameter, 0, &values, &mut totals, 1);
        for row in 0..batch {
            let wide: Vec<f64> = values[row * len..][..len].iter().map(|&x| f64::from(x)).collect();
            close(&totals[row * dim..][..dim], &defined(&sketch, parameter, &wide), 10.0);
        }
    }

    #[test]
    fn outer_equals_flat_of_the_matrix(
        terms in 1usize..9, rows in 1usize..21, columns in 1usize..9, odd in 0usize..3,
        dim in 16usize..200, start in 0u64..3, transposed in any::<bool>(), seed in any::<u64>(),
    ) {
        // Half of the shapes have rows of whole chunks, which go in tile by tile.
        let (columns, start) = if odd == 0 { (7 * columns, 5 * start) } else { (16 * columns, 16 * start) };
        let batch = 2;
        let (left, right) = (random(seed, batch * terms * rows), random(!seed, batch * terms * columns));
        let mut matrices = vec![0.0f32; batch * rows * columns];
        let at = |b: usize, t: usize, r: usize| {
            if transposed { (b * rows + r) * terms + t } else { (b * terms + t) * rows + r }
        };
        for b in 0..batch { for r in 0..rows { for c in 0..columns { for t in 0..terms {
            let sum = &mut matrices[(b * rows + r) * columns + c];
            *sum = left[at(b, t, r)].mul_add(right[(b * terms + t) * columns + c], *sum);
        }}}}
        let strides = if transposed { [rows * terms, 1, terms] } else { [terms * rows, rows, 1] };
        let left = Sequences::new("left", &left, [batch, terms, rows], strides).unwrap();
        let right = Sequences::new(
            "right", &right, [batch, terms, columns], [terms * columns, columns, 1]).unwrap();
        let asker = Asker::new(&never);
        let mut first: Option<Vec<f64>> = None;
        for set in InstructionSet::available() {
            let sketch = chunked(dim, seed).with_instruction_set(set);
            let parameter = sketch.parameter("w", &[start + (rows * columns) as u64]).unwrap();
            let mut expected = vec![0.0; batch * dim];
            flat(&sketch, parameter, start, &matrices, &mut expected, 1);
            for threads in [1, 3] {
                let mut found = vec![0.0; batch * dim];
                sketch.add_outer(parameter, start, left, right, Totals::new(&mut found, dim, 0), None, None, threads, &asker).unwrap();
                if odd == 0 {
                    prop_assert_eq!(&found, &expected);
                }
                close(&found, &expected, 50.0);
                // The same bits for any number of threads and in every instruction set.
                prop_assert_eq!(first.get_or_insert_with(|| found.clone()), &found);
            }
        }
        // ... and for any batch split: slots shared by samples, or of a sample's own.
        let sketch = chunked(dim, seed);
        let parameter = sketch.parameter("w", &[start + (rows * columns) as u64]).unwrap();
        for b in 0..batch {
            let one = |all: Sequences<'_>| -> Vec<f32> {
                let [_, terms, width] = all.shape;
                let value = |t: usize, w: usize| {
                    all.values[b * all.strides[0] + t * all.strides[1] + w * all.strides[2]]
                };
                (0..terms).flat_map(|t| (0..width).map(move |w| value(t, w))).collect()
            };
            let (l, r) = (one(left), one(right));
            let l = Sequences::new("left", &l, [1, terms, rows], [0, rows, 1]).unwrap();
            let r = Sequences::new("right", &r, [1, terms, columns], [0, columns, 1]).unwrap();
            let mut found = vec![0.0; dim];
            sketch.add_outer(parameter, start, l, r, Totals::new(&mut found, dim, 0), None, None, 1, &asker).unwrap();
            prop_assert_eq!(&found[..], &first.as_ref().unwrap()[b * dim..][..dim]);
        }
    }

    #[test]
    fn lookup_equals_flat_of_the_table_bit_for_bit(
        indices in prop::collection::vec(0i64..7, 2..30), width in 1usize..40, seed in any::<u64>(),
    ) {
        let batch = 2;
        let terms = indices.len() / batch;
        let indices = &indices[..terms * batch];
        let values = random(seed, batch * terms * width);
        let mut tables = vec![0.0f32; batch * 7 * width];
        for (term, &index) in indices.iter().enumerate() {
            if index == 3 { continue; }
            for w in 0..width {
                tables[(term / terms * 7 + usize::try_from(index).unwrap()) * width + w] += values[term * width + w];
            }
        }
        let sketch = chunked(32, seed);
        let parameter = sketch.parameter("w", &[7, width as u64]).unwrap();
        let asker = Asker::new(&never);
        let (mut expected, mut found) = (vec![0.0; batch * 32], vec![0.0; batch * 32]);
        flat(&sketch, parameter, 0, &tables, &mut expected, 1);
        sketch.add_lookup(parameter, indices, &values, width, Some(3), batch, Totals::new(&mut found, 32, 0), 2, &asker)
            .unwrap();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn super_blocks_give_the_same_bits_for_any_split_and_thread_count() {
    let len = (2 << 20) + 5003;
    let values = random(3, 2 * len);
    let mut all = Vec::new();
    for set in InstructionSet::available() {
        let sketch = chunked(96, 9).with_instruction_set(set);
        let parameter = sketch.parameter("w", &[len as u64]).unwrap();
        for threads in [1, 2, 8] {
            let mut totals = vec![0.0; 2 * 96];
            flat(&sketch, parameter, 0, &values, &mut totals, threads);
            all.push(totals);
        }
        let mut totals = vec![0.0; 96];
        flat(&sketch, parameter, 0, &values[..len], &mut totals, 1);
        assert_eq!(totals, all[0][..96]);
        let wide: Vec<f64> = values[..len].iter().map(|&x| f64::from(x)).collect();
        close(&totals, &defined(&sketch, parameter, &wide), 1e3);
    }
    assert!(all.iter().all(|totals| *totals == all[0]));
}

#[test]
fn not_finite_rows_are_named() {
    let sketch = chunked(16, 0);
    for len in [8u64, 64] {
        let parameter = sketch.parameter("w", &[len]).unwrap();
        let mut values = vec![1.0f32; 3 * len as usize];
        values[len as usize + 2] = f32::NAN;
        values[2 * len as usize] = f32::INFINITY;
        let mut totals = vec![0.0; 48];
        let bad = flat(&sketch, parameter, 0, &values, &mut totals, 1);
        assert_eq!(bad, [1, 2]);
    }
}

#[test]
fn inner_products_are_unbiased_with_the_stated_variance() {
    // 64 coordinates in 4 chunks of 16; pairs within a chunk contribute no variance.
    let (x, y) = (random(1, 64), random(2, 64));
    let (dim, draws) = (24, 20_000);
    let exact: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(x * y)).sum();
    let mut variance = 0.0;
    for i in 0..64 {
        for j in (0..64).filter(|j| j / LANES != i / LANES) {
            let (xi, yi, xj, yj) =
                (f64::from(x[i]), f64::from(y[i]), f64::from(x[j]), f64::from(y[j]));
            variance += (xi * xi * yj * yj + xi * yi * xj * yj) / dim as f64;
        }
    }
    let (mut sum, mut squares) = (0.0, 0.0);
    for seed in 0..draws {
        let sketch = chunked(dim, seed);
        let parameter = sketch.parameter("w", &[64]).unwrap();
        let mut rows = vec![0.0; 2 * dim];
        let both = [x.clone(), y.clone()].concat();
        flat(&sketch, parameter, 0, &both, &mut rows, 1);
        let product: f64 = (0..dim).map(|i| rows[i] * rows[dim + i]).sum();
        sum += product - exact;
        squares += (product - exact).powi(2);
    }
    let mean = sum / draws as f64;
    assert!(mean.abs() < 4.0 * (variance / draws as f64).sqrt(), "bias {mean}");
    let ratio = squares / draws as f64 / variance;
    // The mean of 20,000 squares with a kurtosis below 12 scatters by at most 2.4 %.
    assert!((ratio - 1.0).abs() < 0.1, "variance ratio {ratio}");
}

#[test]
fn a_hostile_dim_or_shape_is_refused() {
    assert!(Sketch::new(Kind::ChunkedSjlt, 0, 0).is_err());
    assert!(Sketch::new(Kind::ChunkedSjlt, 1 << 62, 0).is_err());
    assert!(chunked(8, 0).parameter("w", &[1 << 40, 1 << 40]).is_err());
}
