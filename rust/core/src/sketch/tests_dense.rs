//! The kinds with dense columns against their definitions, entry by entry in f64.

use proptest::prelude::*;

use super::tests::{close, flat, random};
use super::*;
use crate::normal;
use crate::stop::{Asker, never};

const KINDS: [Kind; 3] = [Kind::Rademacher, Kind::Gaussian, Kind::Srht];

fn new(kind: Kind, dim: usize, seed: u64) -> Sketch {
    Sketch::new(kind, dim, seed).unwrap()
}

/// Column `c` of the map.
fn column(sketch: &Sketch, parameter: Parameter, c: u64) -> Vec<f64> {
    let (key, dim) = (parameter.key, sketch.dim as u64);
    let scale = 1.0 / (dim as f64).sqrt();
    let sign = |bit: u64| if bit & 1 == 1 { -scale } else { scale };
    match sketch.kind {
        Kind::Rademacher => (0..dim)
            .map(|b| sign(random::value(key, c * dim.div_ceil(64) + b / 64) >> (b % 64)))
            .collect(),
        Kind::Gaussian => (0..dim)
            .map(|b| {
                let word = random::value(key, c * dim.div_ceil(2) + b / 2);
                let bits = if b % 2 == 0 { word as u32 } else { (word >> 32) as u32 };
                f64::from(normal::quantile(bits) as f32) * scale
            })
            .collect(),
        Kind::Srht => {
            let n = dim.max(16).next_power_of_two();
            let (block, i) = (c / n, c % n);
            let word = random::value(key, block * (n / 64).max(1) + i / 64);
            let before = if word >> (i % 64) & 1 == 1 { -1.0 } else { 1.0 };
            let mut order: Vec<u64> = (0..n).collect();
            let draw = |step: u64| {
                let bits = random::value(key, (1 << 63) + block * n + step);
                let other = step + (((bits >> 32) * (n - step)) >> 32);
                order.swap(step as usize, other as usize);
                let minus = u64::from((order[step as usize] & i).count_ones());
                before * sign(bits ^ minus)
            };
            (0..dim).map(draw).collect()
        }
        kind => panic!("{kind:?}"),
    }
}

fn defined(sketch: &Sketch, parameter: Parameter, start: u64, values: &[f32]) -> Vec<f64> {
    let mut row = vec![0.0; sketch.dim];
    for (c, &value) in (start..).zip(values) {
        for (sum, entry) in row.iter_mut().zip(column(sketch, parameter, c)) {
            *sum += entry * f64::from(value);
        }
    }
    row
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn flat_follows_the_definition_with_the_same_bits_however_it_is_split(
        kind in prop::sample::select(&KINDS), dim in 1usize..140, start in 0u64..300, width in 1usize..300,
        batch in 1usize..20, far in any::<bool>(), seed in any::<u64>(),
    ) {
        // Half of the cases have a place in their middle where sums are split.
        let start = if far { (3 << 16) - width as u64 / 2 } else { start };
        let values = random(seed, batch * width);
        let mut first = None;
        for set in InstructionSet::available() {
            let sketch = new(kind, dim, seed).with_instruction_set(set);
            let parameter = sketch.parameter("w", &[start + width as u64]).unwrap();
            for threads in [1, 2, 7] {
                let mut totals = vec![0.0; batch * dim];
                flat(&sketch, parameter, start, &values, &mut totals, threads);
                prop_assert_eq!(first.get_or_insert_with(|| totals.clone()), &totals);
            }
        }
        let first = first.unwrap();
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &[start + width as u64]).unwrap();
        for (values, first) in values.chunks(width).zip(first.chunks(dim)) {
            let mut alone = vec![0.0; dim];
            flat(&sketch, parameter, start, values, &mut alone, 1);
            prop_assert_eq!(&alone[..], first);
            close(first, &defined(&sketch, parameter, start, values), 10.0);
            if far {
                let (low, high) = values.split_at(width / 2);
                let mut parts = vec![0.0; dim];
                flat(&sketch, parameter, start, low, &mut parts, 1);
                flat(&sketch, parameter, start + low.len() as u64, high, &mut parts, 1);
                prop_assert_eq!(&parts[..], first);
            }
        }
    }

    #[test]
    fn outer_and_lookup_equal_flat_of_the_matrix(
        kind in prop::sample::select(&KINDS), dim in 1usize..70, terms in 1usize..4, rows in 2usize..12,
        columns in 1usize..40, threads in 1usize..4, seed in any::<u64>(),
    ) {
        let batch = 3;
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &[rows as u64, columns as u64]).unwrap();
        let asker = Asker::new(&never);
        let (left, right) = (random(seed, batch * terms * rows), random(!seed, batch * terms * columns));
        let indices: Vec<i64> =
            (0..(batch * terms) as u64).map(|i| (random::value(seed, i) % rows as u64).cast_signed()).collect();
        let mut matrices = [vec![0.0f32; batch * rows * columns], vec![0.0; batch * rows * columns]];
        for (term, (left, right)) in left.chunks(rows).zip(right.chunks(columns)).enumerate() {
            for (row, &factor) in left.iter().enumerate() {
                for (column, &value) in right.iter().enumerate() {
                    let at = (term / terms * rows + row) * columns + column;
                    matrices[0][at] += factor * value;
                    if indices[term] == row.cast_signed() as i64 {
                        matrices[1][at] += value;
                    }
                }
            }
        }
        let expected = matrices.map(|matrices| {
            let mut expected = vec![0.0; batch * dim];
            flat(&sketch, parameter, 0, &matrices, &mut expected, 1);
            expected
        });
        let mut found = vec![0.0; batch * dim];
        let sequences = |name, values, width| {
            Sequences::new(name, values, [batch, terms, width], [terms * width, width, 1]).unwrap()
        };
        let (left, views) = (sequences("left", &left, rows), sequences("right", &right, columns));
        let totals = Totals::new(&mut found, dim, 0);
        sketch.add_outer(parameter, 0, left, views, totals, None, None, threads, &asker).unwrap();
        close(&found, &expected[0], 10.0);
        found.fill(0.0);
        let totals = Totals::new(&mut found, dim, 0);
        sketch.add_lookup(parameter, &indices, &right, columns, None, batch, totals, threads, &asker).unwrap();
        close(&found, &expected[1], 10.0);
    }
}

#[test]
fn rows_wider_than_a_piece_follow_the_definition() {
    let values = random(5, 90);
    for (kind, dim) in [(Kind::Srht, 70_000), (Kind::Rademacher, 2_100)] {
        let sketch = new(kind, dim, 1);
        let start = (1 << 17) + (1 << 16) - 40;
        let parameter = sketch.parameter("w", &[1 << 20]).unwrap();
        for threads in [1, 3] {
            let mut found = vec![0.0; dim];
            flat(&sketch, parameter, start, &values, &mut found, threads);
            // One coordinate by one: the definition of a column is as wide as the row.
            close(&found, &defined(&sketch, parameter, start, &values), 1.0);
        }
    }
}

/// The mean and the mean square of the errors of `x.y`, over those that the law has.
fn errors(kind: Kind, dim: usize, draws: u64, x: &[f32], y: &[f32]) -> (f64, f64) {
    let n = dim.max(16).next_power_of_two();
    let mut variance = 0.0;
    for i in 0..x.len() {
        for j in 0..x.len() {
            let weight = match kind {
                Kind::Gaussian => 1.0,
                _ if i == j => 0.0,
                Kind::Srht if i / n == j / n => (n - dim) as f64 / (n - 1) as f64,
                _ => 1.0,
            };
            let [xi, yi, xj, yj] = [x[i], y[i], x[j], y[j]].map(f64::from);
            variance += weight * (xi * xi * yj * yj + xi * yi * xj * yj) / dim as f64;
        }
    }
    let exact: f64 = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    let both = [x, y].concat();
    let (mut sum, mut squares) = (0.0, 0.0);
    for seed in 0..draws {
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &[x.len() as u64]).unwrap();
        let mut rows = vec![0.0; 2 * dim];
        flat(&sketch, parameter, 0, &both, &mut rows, 1);
        let product: f64 = (0..dim).map(|i| rows[i] * rows[dim + i]).sum();
        sum += product - exact;
        squares += (product - exact).powi(2);
    }
    let draws = draws as f64;
    (sum / draws / (variance / draws).sqrt(), squares / draws / variance)
}

#[test]
fn inner_products_are_unbiased_with_the_stated_variance() {
    let (x, y) = (random(1, 40), random(2, 40));
    for (kind, dim) in [
        (Kind::Rademacher, 6),
        (Kind::Gaussian, 6),
        (Kind::Srht, 6),
        (Kind::Srht, 16),
        (Kind::Srht, 20),
    ] {
        let (bias, ratio) = errors(kind, dim, 8000, &x, &y);
        assert!(bias.abs() < 4.0, "{kind:?} {dim}: bias {bias}");
        // The mean of 8000 squares with a kurtosis below 12 scatters by at most 3.7 %.
        assert!((ratio - 1.0).abs() < 0.1, "{kind:?} {dim}: variance ratio {ratio}");
    }
}

#[test]
fn first_coordinates_of_blocks_are_as_apart_as_others() {
    // Their columns of the transform are all ones.
    let (mut x, mut y) = (vec![0.0; 64], vec![0.0; 64]);
    (x[0], x[16], y[16], y[48]) = (1.0, 0.5, 2.0, -1.0);
    let (bias, ratio) = errors(Kind::Srht, 12, 4000, &x, &y);
    assert!(bias.abs() < 4.0 && (ratio - 1.0).abs() < 0.1, "{bias} {ratio}");
}

#[test]
fn a_block_is_rotated_if_all_of_its_transform_is_kept() {
    let (x, y) = (random(3, 64), random(4, 64));
    let exact: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    let sketch = new(Kind::Srht, 64, 9);
    let parameter = sketch.parameter("w", &[64]).unwrap();
    let mut rows = vec![0.0; 128];
    flat(&sketch, parameter, 0, &[x, y].concat(), &mut rows, 1);
    let product: f64 = (0..64).map(|i| rows[i] * rows[64 + i]).sum();
    assert!((product - exact).abs() < 1e-5, "{product} {exact}");
}

#[test]
fn not_finite_rows_are_named() {
    for kind in KINDS {
        for (batch, threads) in [(3, 1), (20, 1), (20, 3)] {
            let sketch = new(kind, 40, 0);
            let parameter = sketch.parameter("w", &[70]).unwrap();
            let mut values = vec![1.0f32; batch * 70];
            values[70 + 69] = f32::NAN;
            values[(batch - 1) * 70] = f32::NEG_INFINITY;
            let mut totals = vec![0.0; batch * 40];
            let bad = flat(&sketch, parameter, 0, &values, &mut totals, threads);
            assert_eq!(bad, [1, batch - 1], "{kind:?}");
        }
    }
}

#[test]
fn the_kinds_have_names() {
    for (name, kind) in ["rademacher", "gaussian", "srht"].into_iter().zip(KINDS) {
        assert_eq!(Kind::named(name, 1).unwrap(), kind);
    }
}
