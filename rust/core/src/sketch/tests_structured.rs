//! The kinds that see a parameter as a matrix, or keep a part of it, against their definitions,
//! entry by entry in f64.

use proptest::prelude::*;

use super::tests::{close, flat, random};
use super::*;
use crate::stop::{Asker, never};

const KINDS: [Kind; 4] = [Kind::TensorSketch, Kind::Kronecker, Kind::Grass, Kind::FactGrass];
const HALF: u64 = 1 << 63;

fn new(kind: Kind, dim: usize, seed: u64) -> Sketch {
    Sketch::new(kind, dim, seed).unwrap()
}

/// One nonzero, at a bucket.
fn at(dim: usize, bucket: u64, value: f64) -> Vec<f64> {
    let mut column = vec![0.0; dim];
    column[bucket as usize] = value;
    column
}

fn sign(bit: u64) -> f64 {
    if bit & 1 == 1 { -1.0 } else { 1.0 }
}

/// Coordinate `c` of a chunked sketch.
fn chunk(key: u64, dim: usize, c: u64, weight: f64) -> Vec<f64> {
    let bits = random::value(key, c / 16);
    let (offset, lane, dims) = (((bits >> 32) * dim as u64) >> 32, c % 16, dim as u64);
    let ring = if dims.is_multiple_of(16) { dims } else { (dims / 16).saturating_sub(1) * 16 };
    let bucket =
        if offset < ring { offset ^ lane } else { ring + (offset - ring + lane) % (dims - ring) };
    at(dim, bucket, sign(bits >> lane) * weight)
}

/// The bounds of `m` strata of `n` things.
fn strata(n: u64, most: u64) -> Vec<(u64, u64)> {
    let m = n.min(most);
    (0..m).map(|k| (k * n / m, (k + 1) * n / m)).collect()
}

/// For each of `n` things the number and the size of its stratum, if it is the one chosen.
fn chosen(key: u64, counter: u64, n: u64, most: u64) -> Vec<Option<(u64, f64)>> {
    let mut found = vec![None; n as usize];
    for (stratum, (start, end)) in (0..).zip(strata(n, most)) {
        let bits = u128::from(random::value(key, counter + stratum));
        let place = (bits * u128::from(end - start)) >> 64;
        found[start as usize + place as usize] = Some((stratum, (end - start) as f64));
    }
    found
}

fn side(dim: usize) -> u64 {
    (1..=4 * dim as u64).find(|side| side * side >= 4 * dim as u64).unwrap()
}

/// The columns of the map for some coordinates.
fn columns(sketch: &Sketch, parameter: Parameter, start: u64, width: usize) -> Vec<Vec<f64>> {
    let Parameter { key, len, columns } = parameter;
    let dim = sketch.dim;
    let coordinates = start..start + width as u64;
    let hash = |counter: u64| {
        let bits = random::value(key, counter);
        (((bits >> 32) * dim as u64) >> 32, sign(bits))
    };
    match sketch.kind {
        Kind::TensorSketch => coordinates
            .map(|c| {
                let (bucket, sign) = hash(c / columns);
                let across = if columns == 1 { (0, 1.0) } else { hash(HALF + c % columns) };
                at(dim, (bucket + across.0) % dim as u64, sign * across.1)
            })
            .collect(),
        Kind::Kronecker if columns == 1 => coordinates.map(|c| chunk(key, dim, c, 1.0)).collect(),
        Kind::Kronecker => {
            let left = (1..=dim).rfind(|&d| d * d <= dim && dim.is_multiple_of(d)).unwrap();
            let right = dim / left;
            let bit = |first: u64, thing: u64, side: usize, place: usize| {
                let word = first + thing * side.div_ceil(64) as u64 + place as u64 / 64;
                sign(random::value(key, word) >> (place % 64))
            };
            coordinates
                .map(|c| {
                    let entry = |bucket: usize| {
                        bit(0, c / columns, left, bucket / right)
                            * bit(HALF, c % columns, right, bucket % right)
                            / (dim as f64).sqrt()
                    };
                    (0..dim).map(entry).collect()
                })
                .collect()
        }
        Kind::Grass | Kind::FactGrass if sketch.kind == Kind::Grass || columns == 1 => {
            let chosen = chosen(key, HALF, len, 4 * dim as u64);
            let column = |c: u64| match chosen[c as usize] {
                Some((stratum, size)) => {
                    let (bucket, sign) = hash(stratum);
                    at(dim, bucket, sign * size.sqrt())
                }
                None => vec![0.0; dim],
            };
            coordinates.map(column).collect()
        }
        Kind::FactGrass => {
            let rows = chosen(key, HALF, len / columns, side(dim));
            let across = chosen(key, HALF + HALF / 2, columns, side(dim));
            let width = columns.min(side(dim));
            let column =
                |c: u64| match (rows[(c / columns) as usize], across[(c % columns) as usize]) {
                    (Some((a, rows)), Some((b, columns))) => {
                        chunk(key, dim, a * width + b, (rows * columns).sqrt())
                    }
                    _ => vec![0.0; dim],
                };
            coordinates.map(column).collect()
        }
        kind => panic!("{kind:?}"),
    }
}

fn defined(sketch: &Sketch, parameter: Parameter, start: u64, values: &[f32]) -> Vec<f64> {
    let mut row = vec![0.0; sketch.dim];
    for (column, &value) in columns(sketch, parameter, start, values.len()).iter().zip(values) {
        for (sum, entry) in row.iter_mut().zip(column) {
            *sum += entry * f64::from(value);
        }
    }
    row
}

/// Factors of outer products, and where their block begins.
struct Factors {
    shape: [u64; 2],
    first: u64,
    batch: usize,
    terms: usize,
    rows: usize,
    columns: usize,
    left: Vec<f32>,
    right: Vec<f32>,
    /// Whether the terms of a column of `left` lie side by side.
    transposed: bool,
}

impl Factors {
    fn sequences(&self) -> [Sequences<'_>; 2] {
        let Self { batch, terms, rows, columns, .. } = *self;
        let strides =
            if self.transposed { [rows * terms, 1, terms] } else { [terms * rows, rows, 1] };
        let right = [terms * columns, columns, 1];
        [
            Sequences::new("left", &self.left, [batch, terms, rows], strides).unwrap(),
            Sequences::new("right", &self.right, [batch, terms, columns], right).unwrap(),
        ]
    }

    fn left(&self, sample: usize, term: usize, row: usize) -> f32 {
        let place = if self.transposed { row * self.terms + term } else { term * self.rows + row };
        self.left[sample * self.terms * self.rows + place]
    }

    /// The matrices of all samples.
    fn matrices(&self) -> Vec<f32> {
        let mut matrices = Vec::new();
        for sample in 0..self.batch {
            for row in 0..self.rows {
                for column in 0..self.columns {
                    let product = |term: usize| {
                        let at = (sample * self.terms + term) * self.columns + column;
                        f64::from(self.left(sample, term, row)) * f64::from(self.right[at])
                    };
                    matrices.push((0..self.terms).map(product).sum::<f64>() as f32);
                }
            }
        }
        matrices
    }

    /// The rows of a sketch of some samples, and those not finite.
    fn sketched(
        &self,
        sketch: &Sketch,
        sum: Option<&mut [f32]>,
        threads: usize,
    ) -> (Vec<f64>, Vec<usize>) {
        let parameter = sketch.parameter("w", &self.shape).unwrap();
        let [left, right] = self.sequences();
        let mut found = vec![0.0; self.batch * sketch.dim];
        let totals = Totals::new(&mut found, sketch.dim, 0);
        let asker = Asker::new(&never);
        let bad = sketch
            .add_outer(parameter, self.first, left, right, totals, sum, None, threads, &asker)
            .unwrap();
        (found, bad)
    }

    /// The same of one sample.
    fn alone(&self, sample: usize) -> Self {
        let [left, right] = [&self.left, &self.right].map(|values| {
            let len = values.len() / self.batch;
            values[sample * len..][..len].to_vec()
        });
        Self { batch: 1, left, right, ..*self }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn flat_follows_the_definition_with_the_same_bits_however_it_is_split(
        kind in prop::sample::select(&KINDS), dim in 1usize..200,
        columns in prop_oneof![1 => Just(1), 5 => 2u64..90], start in 0u64..300,
        width in 1usize..300, batch in 1usize..20, far in any::<bool>(), seed in any::<u64>(),
    ) {
        // Half of the cases have a place in their middle where sums are split.
        let start = if far { (1 << 16) - width as u64 / 2 } else { start };
        let rows = (start + width as u64).div_ceil(columns);
        let values = random(seed, batch * width);
        let mut first = None;
        for set in InstructionSet::available() {
            let sketch = new(kind, dim, seed).with_instruction_set(set);
            let parameter = sketch.parameter("w", &[rows, columns]).unwrap();
            for threads in [1, 2, 7] {
                let mut totals = vec![0.0; batch * dim];
                flat(&sketch, parameter, start, &values, &mut totals, threads);
                prop_assert_eq!(first.get_or_insert_with(|| totals.clone()), &totals);
            }
        }
        let first = first.unwrap();
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &[rows, columns]).unwrap();
        for (values, first) in values.chunks(width).zip(first.chunks(dim)) {
            let mut alone = vec![0.0; dim];
            flat(&sketch, parameter, start, values, &mut alone, 1);
            prop_assert_eq!(&alone[..], first);
            // A value has at most the weight of the strata that it stands for.
            let scale = 10.0 * (parameter.len as f64 / dim as f64).sqrt().max(1.0);
            close(first, &defined(&sketch, parameter, start, values), scale);
            if far && width > 1 {
                let (low, high) = values.split_at(width / 2);
                let mut parts = vec![0.0; dim];
                flat(&sketch, parameter, start, low, &mut parts, 1);
                flat(&sketch, parameter, start + low.len() as u64, high, &mut parts, 1);
                prop_assert_eq!(&parts[..], first);
            }
        }
    }

    #[test]
    fn outer_equals_flat_of_the_matrix_with_the_same_bits_however_it_is_split(
        kind in prop::sample::select(&KINDS), dim in 1usize..300, terms in 1usize..40, rows in 1usize..40,
        columns in 1usize..50, before in 0u64..3, after in 0u64..3, odd in any::<bool>(),
        transposed in any::<bool>(), seed in any::<u64>(),
    ) {
        let batch = 3;
        // A block of whole rows, or one that is in their way.
        let across = columns as u64 + u64::from(odd);
        let factors = Factors {
            shape: [before + rows as u64 + after, across],
            first: before * across,
            batch, terms, rows, columns, transposed,
            left: random(seed, batch * terms * rows),
            right: random(!seed, batch * terms * columns),
        };
        let matrices = factors.matrices();
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &factors.shape).unwrap();
        let mut expected = vec![0.0; batch * dim];
        flat(&sketch, parameter, factors.first, &matrices, &mut expected, 1);
        let mut first = None;
        for set in InstructionSet::available() {
            let sketch = sketch.with_instruction_set(set);
            for (threads, summed) in [(1, false), (2, true), (3, false)] {
                let mut sum = vec![1.0; rows * columns];
                let (found, bad) = factors.sketched(&sketch, summed.then_some(&mut sum), threads);
                prop_assert!(bad.is_empty());
                prop_assert_eq!(first.get_or_insert_with(|| found.clone()), &found);
                for (place, sum) in sum.iter().enumerate().filter(|_| summed) {
                    let samples = (0..batch).map(|b| f64::from(matrices[b * rows * columns + place]));
                    prop_assert!((f64::from(*sum) - 1.0 - samples.sum::<f64>()).abs() < 1e-4);
                }
            }
        }
        let first = first.unwrap();
        close(&first, &expected, 20.0 * terms as f64);
        for sample in 0..batch {
            let (alone, _) = factors.alone(sample).sketched(&sketch, None, 1);
            prop_assert_eq!(&alone[..], &first[sample * dim..][..dim]);
        }
    }

    #[test]
    fn convolutions_are_the_sketches_of_the_matrices(
        dim in 1usize..1200, power in any::<bool>(), terms in 1usize..4, rows in 1usize..30,
        columns in 2usize..30, exponent in -25i32..25, more in -3i32..3, seed in any::<u64>(),
    ) {
        // Factors of one size, or of very different ones.
        let dim = if power { dim.next_power_of_two() } else { dim };
        let sizes = [10f32.powi(exponent), 10f32.powi(more - exponent)];
        let sketch = new(Kind::TensorSketch, dim, seed);
        let mut factors = Factors {
            shape: [rows as u64, columns as u64],
            first: 0,
            batch: 2, terms, rows, columns, transposed: false,
            left: random(seed, 2 * terms * rows),
            right: random(!seed, 2 * terms * columns),
        };
        for (side, size) in [&mut factors.left, &mut factors.right].into_iter().zip(sizes) {
            for value in side { *value *= size; }
        }
        factors.left[..rows].fill(0.0);
        let parameter = sketch.parameter("w", &factors.shape).unwrap();
        let [left, right] = factors.sequences();
        let block = outer::Block { parameter, start: 0, left, right, bias: None };
        let asker = Asker::new(&never);
        let mut first = None;
        for set in InstructionSet::available() {
            let sketch = sketch.with_instruction_set(set);
            let mut found = vec![0.0; 2 * dim];
            let totals = Totals::new(&mut found, dim, 0).share(&sketch, 2).unwrap();
            let bad = tensorsketch::add_outer(&sketch, block, 0, &totals, 2, &asker).unwrap();
            drop(totals);
            prop_assert!(bad.is_empty());
            prop_assert_eq!(first.get_or_insert_with(|| found.clone()), &found);
        }
        let matrices = factors.matrices();
        let scale = f64::from(sizes[0]) * f64::from(sizes[1]);
        for (found, matrix) in first.unwrap().chunks(dim).zip(matrices.chunks(rows * columns)) {
            let expected = defined(&sketch, parameter, 0, matrix);
            close(found, &expected, scale * ((rows * columns) as f64).sqrt() * terms as f64);
        }
    }

    #[test]
    fn lookup_equals_flat_of_the_table(
        kind in prop::sample::select(&KINDS), dim in 1usize..70, terms in 1usize..6, rows in 1usize..12,
        columns in 1usize..40, threads in 1usize..3, seed in any::<u64>(),
    ) {
        let batch = 3;
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &[rows as u64, columns as u64]).unwrap();
        let values = random(seed, batch * terms * columns);
        let indices: Vec<i64> =
            (0..(batch * terms) as u64).map(|i| (random::value(seed, i) % rows as u64).cast_signed()).collect();
        let mut tables = vec![0.0f32; batch * rows * columns];
        for (term, values) in values.chunks(columns).enumerate() {
            let row = term / terms * rows + usize::try_from(indices[term]).unwrap();
            for (sum, value) in tables[row * columns..].iter_mut().zip(values) {
                *sum += value;
            }
        }
        let (mut expected, mut found) = (vec![0.0; batch * dim], vec![0.0; batch * dim]);
        flat(&sketch, parameter, 0, &tables, &mut expected, 1);
        let totals = Totals::new(&mut found, dim, 0);
        let asker = Asker::new(&never);
        sketch.add_lookup(parameter, &indices, &values, columns, None, batch, totals, threads, &asker).unwrap();
        close(&found, &expected, 20.0);
    }
}

#[test]
fn a_wide_layer_goes_in_by_convolutions() {
    let (batch, terms, rows, columns, dim) = (5, 3, 300, 200, 256);
    let factors = Factors {
        shape: [400, 200],
        first: 50 * 200,
        batch,
        terms,
        rows,
        columns,
        left: random(1, batch * terms * rows),
        right: random(2, batch * terms * columns),
        transposed: false,
    };
    let sketch = new(Kind::TensorSketch, dim, 3);
    let parameter = sketch.parameter("w", &factors.shape).unwrap();
    let [left, right] = factors.sequences();
    let block = outer::Block { parameter, start: factors.first, left, right, bias: None };
    assert!(tensorsketch::is_quicker(dim, &block));
    let matrices = factors.matrices();
    let mut expected = vec![0.0; batch * dim];
    flat(&sketch, parameter, factors.first, &matrices, &mut expected, 1);
    let (first, _) = factors.sketched(&sketch, None, 1);
    close(&first, &expected, 200.0);
    let mut sum = vec![0.0; rows * columns];
    assert_eq!(factors.sketched(&sketch, Some(&mut sum), 2).0, first);
    for (place, sum) in sum.iter().enumerate() {
        let samples = matrices.iter().skip(place).step_by(rows * columns);
        assert!(
            (f64::from(*sum) - samples.map(|&value| f64::from(value)).sum::<f64>()).abs() < 1e-4
        );
    }
    for sample in 0..batch {
        assert_eq!(
            factors.alone(sample).sketched(&sketch, None, 1).0,
            first[sample * dim..][..dim]
        );
    }
}

#[test]
fn many_projections_of_both_sides_follow_the_definition() {
    // 129 by 130: more than are made at a time.
    let (batch, terms, rows, columns, dim) = (2, 3, 20, 30, 129 * 130);
    let factors = Factors {
        shape: [20, 30],
        first: 0,
        batch,
        terms,
        rows,
        columns,
        left: random(1, batch * terms * rows),
        right: random(2, batch * terms * columns),
        transposed: false,
    };
    let sketch = new(Kind::Kronecker, dim, 3);
    let parameter = sketch.parameter("w", &factors.shape).unwrap();
    let matrices = factors.matrices();
    let (found, _) = factors.sketched(&sketch, None, 1);
    let mut by_rows = vec![0.0; batch * dim];
    flat(&sketch, parameter, 0, &matrices, &mut by_rows, 1);
    let pairs = found.chunks(dim).zip(by_rows.chunks(dim)).zip(matrices.chunks(rows * columns));
    for ((found, by_rows), matrix) in pairs {
        let expected = defined(&sketch, parameter, 0, matrix);
        close(found, &expected, 10.0);
        close(by_rows, &expected, 10.0);
    }
}

#[test]
fn a_bias_gets_the_sums_of_the_left_factors() {
    let (batch, terms, rows, columns, dim) = (20, 3, 7, 16, 40);
    for kind in KINDS {
        let factors = Factors {
            shape: [7, 16],
            first: 0,
            batch,
            terms,
            rows,
            columns,
            left: random(1, batch * terms * rows),
            right: random(2, batch * terms * columns),
            transposed: true,
        };
        let sketch = new(kind, dim, 3);
        let weight = sketch.parameter("w", &factors.shape).unwrap();
        let bias = sketch.parameter("b", &[9]).unwrap();
        let asker = Asker::new(&never);
        let (mut expected, _) = factors.sketched(&sketch, None, 1);
        for sample in 0..batch {
            let sum = |row| (0..terms).map(|term| factors.left(sample, term, row)).sum();
            let sums: Vec<f32> = (0..rows).map(sum).collect();
            flat(&sketch, bias, 2, &sums, &mut expected[sample * dim..][..dim], 1);
        }
        let [left, right] = factors.sequences();
        let mut found = vec![0.0; batch * dim];
        let totals = Totals::new(&mut found, dim, 0);
        let bias = Some((bias, 2));
        sketch.add_outer(weight, 0, left, right, totals, None, bias, 2, &asker).unwrap();
        close(&found, &expected, 10.0);
    }
}

/// A matrix, row by row.
type Rows = Vec<Vec<f64>>;

fn sum_of_pairs(first: usize, second: usize, f: impl Fn(usize, usize) -> f64) -> f64 {
    (0..first).map(|i| (0..second).map(|j| f(i, j)).sum::<f64>()).sum()
}

/// The variance of a kind whose map of a matrix is made of one for rows and one for columns.
fn law_of_sides(x: &Rows, y: &Rows, columns: f64, rows: f64, both: f64, crossed: f64) -> f64 {
    let (n, m) = (x.len(), x[0].len());
    let a = |j: usize, l: usize| -> f64 { (0..n).map(|i| x[i][j] * y[i][l]).sum() };
    let b = |i: usize, k: usize| -> f64 { (0..m).map(|j| x[i][j] * y[k][j]).sum() };
    let apart = |i: usize, j: usize, f: f64| if i == j { 0.0 } else { f };
    let of_columns = sum_of_pairs(m, m, |j, l| apart(j, l, a(j, l) * a(j, l) + a(j, l) * a(l, j)));
    let of_rows = sum_of_pairs(n, n, |i, k| apart(i, k, b(i, k) * b(i, k) + b(i, k) * b(k, i)));
    let mut of_both = 0.0;
    for i in 0..n {
        for k in (0..n).filter(|&k| k != i) {
            of_both += sum_of_pairs(m, m, |j, l| {
                let plain =
                    x[i][j].powi(2) * y[k][l].powi(2) + x[i][j] * y[i][j] * x[k][l] * y[k][l];
                let cross = x[i][j] * y[k][l] * (x[i][l] * y[k][j] + x[k][j] * y[i][l]);
                apart(j, l, both * plain + crossed * cross)
            });
        }
    }
    columns * of_columns + rows * of_rows + of_both
}

fn law_of_grass(x: &Rows, y: &Rows, dim: usize) -> f64 {
    let (x, y) = (x.concat(), y.concat());
    let strata = strata(x.len() as u64, 4 * dim as u64);
    let over = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
        strata.iter().map(|&(start, end)| (start as usize..end as usize).map(f).sum()).collect()
    };
    let (xs, ys) = (over(&|c| x[c] * x[c]), over(&|c| y[c] * y[c]));
    let (ps, squares) = (over(&|c| x[c] * y[c]), over(&|c| (x[c] * y[c]).powi(2)));
    let count = strata.len();
    let choice: f64 =
        (0..count).map(|k| (strata[k].1 - strata[k].0) as f64 * squares[k] - ps[k].powi(2)).sum();
    choice
        + sum_of_pairs(count, count, |k, l| {
            if k == l { 0.0 } else { (xs[k] * ys[l] + ps[k] * ps[l]) / dim as f64 }
        })
}

fn law_of_factgrass(x: &Rows, y: &Rows, dim: usize) -> f64 {
    let rows = strata(x.len() as u64, side(dim));
    let columns = strata(x[0].len() as u64, side(dim));
    let range = |(start, end): (u64, u64)| start as usize..end as usize;
    let size = |(start, end): (u64, u64)| (end - start) as f64;
    // The mean over all choices of the product of kept entries (a, b) of one matrix and (d, c) of
    // another, both with all their weights.
    let mean = |f: &Rows, g: &Rows, (a, b): (usize, usize), (d, c): (usize, usize)| -> f64 {
        let mut sum = 0.0;
        for i in range(rows[a]) {
            for k in range(rows[d]).filter(|&k| a != d || k == i) {
                for j in range(columns[b]) {
                    for l in range(columns[c]).filter(|&l| b != c || l == j) {
                        sum += f[i][j] * g[k][l];
                    }
                }
            }
        }
        let once = |same: bool, size: f64| if same { size } else { 1.0 };
        sum * once(a == d, size(rows[a])) * once(b == c, size(columns[b]))
    };
    let with = |f: &dyn Fn(f64, f64) -> f64| -> Rows {
        let pairs = x.iter().zip(y);
        pairs.map(|(x, y)| x.iter().zip(y).map(|(&x, &y)| f(x, y)).collect()).collect()
    };
    let (xs, ys, ps) = (with(&|x, _| x * x), with(&|_, y| y * y), with(&|x, y| x * y));
    let (n, m) = (rows.len(), columns.len());
    let total: f64 = ps.concat().iter().sum();
    let mut variance = -total * total;
    for e in 0..n * m {
        for f in 0..n * m {
            let (left, right) = ((e / m, e % m), (f / m, f % m));
            let products = mean(&ps, &ps, left, right);
            variance += products;
            if e / LANES != f / LANES {
                variance += (mean(&xs, &ys, left, right) + products) / dim as f64;
            }
        }
    }
    variance
}

/// The mean and the mean square of the errors of `x.y`, over those that the law has.
fn errors(kind: Kind, dim: usize, draws: u64, x: &Rows, y: &Rows) -> (f64, f64) {
    let d = dim as f64;
    let variance = match kind {
        Kind::TensorSketch => {
            let g = if dim.is_multiple_of(2) { 2.0 } else { 1.0 };
            law_of_sides(x, y, 1.0 / d, 1.0 / d, 1.0 / d, g / (d * d))
        }
        Kind::Kronecker => {
            let left = (1..=dim)
                .rfind(|&left| left * left <= dim && dim.is_multiple_of(left))
                .unwrap() as f64;
            law_of_sides(x, y, left / d, 1.0 / left, 1.0 / d, 1.0 / d)
        }
        Kind::Grass => law_of_grass(x, y, dim),
        _ => law_of_factgrass(x, y, dim),
    };
    let shape = [x.len() as u64, x[0].len() as u64];
    let (x, y) = (x.concat(), y.concat());
    let exact: f64 = x.iter().zip(&y).map(|(x, y)| x * y).sum();
    let both: Vec<f32> = x.iter().chain(&y).map(|&value| value as f32).collect();
    let (mut sum, mut squares) = (0.0, 0.0);
    for seed in 0..draws {
        let sketch = new(kind, dim, seed);
        let parameter = sketch.parameter("w", &shape).unwrap();
        let mut rows = vec![0.0; 2 * dim];
        flat(&sketch, parameter, 0, &both, &mut rows, 1);
        let product: f64 = (0..dim).map(|i| rows[i] * rows[dim + i]).sum();
        sum += product - exact;
        squares += (product - exact).powi(2);
    }
    let draws = draws as f64;
    (sum / draws / (variance / draws).sqrt(), squares / draws / variance)
}

fn matrix(seed: u64, rows: usize, columns: usize) -> Rows {
    let values = random(seed, rows * columns);
    values.chunks(columns).map(|row| row.iter().copied().map(f64::from).collect()).collect()
}

/// Widths, and the shape of a matrix of which each kind leaves something out. The law of chunks
/// holds from a width of 16 on.
fn cases(kind: Kind) -> ([usize; 3], [usize; 2]) {
    if kind == Kind::FactGrass { ([16, 17, 24], [13, 11]) } else { ([6, 7, 12], [9, 8]) }
}

#[test]
fn inner_products_are_unbiased_with_the_stated_variance() {
    for kind in KINDS {
        let (dims, [rows, columns]) = cases(kind);
        let (x, noise) = (matrix(1, rows, columns), matrix(2, rows, columns));
        let both = x.iter().zip(&noise);
        let near: Rows = both
            .map(|(x, noise)| x.iter().zip(noise).map(|(x, noise)| x + noise).collect())
            .collect();
        for (dim, y) in dims.into_iter().zip([&noise, &near, &near]) {
            let (bias, ratio) = errors(kind, dim, 20_000, &x, y);
            assert!(bias.abs() < 4.0, "{kind:?} {dim}: bias {bias}");
            // The mean of 20,000 squares with a kurtosis below 40 scatters by at most 4.5 %.
            assert!((ratio - 1.0).abs() < 0.1, "{kind:?} {dim}: variance ratio {ratio}");
        }
    }
}

#[test]
fn matrices_of_rank_one_have_the_stated_variance() {
    for kind in KINDS {
        let (dims, [rows, columns]) = cases(kind);
        let (left, right) = (matrix(1, 1, rows).concat(), matrix(2, 1, columns).concat());
        let x: Rows = left.iter().map(|u| right.iter().map(|v| u * v).collect()).collect();
        let (bias, ratio) = errors(kind, dims[2], 40_000, &x, &x);
        assert!(bias.abs() < 4.0, "{kind:?}: bias {bias}");
        assert!((ratio - 1.0).abs() < 0.1, "{kind:?}: variance ratio {ratio}");
    }
}

#[test]
fn not_finite_rows_are_named() {
    // Nothing is left out of a parameter as small as this.
    let (batch, terms, rows, columns) = (20, 2, 7, 10);
    for kind in KINDS {
        for threads in [1, 3] {
            let sketch = new(kind, 64, 0);
            let parameter = sketch.parameter("w", &[7, 10]).unwrap();
            let mut values = vec![1.0f32; batch * 70];
            values[70 + 69] = f32::NAN;
            values[19 * 70] = f32::NEG_INFINITY;
            let mut totals = vec![0.0; batch * 64];
            let bad = flat(&sketch, parameter, 0, &values, &mut totals, threads);
            assert_eq!(bad, [1, 19], "{kind:?}");
            let mut factors = Factors {
                shape: [7, 10],
                first: 0,
                batch,
                terms,
                rows,
                columns,
                left: vec![1.0; batch * terms * rows],
                right: vec![0.0; batch * terms * columns],
                transposed: false,
            };
            factors.left[3 * terms * rows + 9] = f32::NAN;
            factors.right[5 * terms * columns] = f32::INFINITY;
            assert_eq!(factors.sketched(&sketch, None, threads).1, [3, 5], "{kind:?}");
        }
    }
}

#[test]
fn not_finite_factors_of_a_convolution_are_named() {
    let sketch = new(Kind::TensorSketch, 512, 0);
    let parameter = sketch.parameter("w", &[30, 40]).unwrap();
    let (mut left, right) = (vec![1.0f32; 3 * 30], vec![0.0f32; 3 * 40]);
    left[30] = f32::NAN;
    left[60] = f32::INFINITY;
    let left = Sequences::new("left", &left, [3, 1, 30], [30, 30, 1]).unwrap();
    let right = Sequences::new("right", &right, [3, 1, 40], [40, 40, 1]).unwrap();
    let block = outer::Block { parameter, start: 0, left, right, bias: None };
    let mut totals = vec![0.0; 3 * 512];
    let totals = Totals::new(&mut totals, 512, 0).share(&sketch, 3).unwrap();
    let asker = Asker::new(&never);
    let bad = tensorsketch::add_outer(&sketch, block, 0, &totals, 1, &asker).unwrap();
    assert_eq!(bad, [1, 2]);
}

#[test]
fn the_kinds_have_names() {
    for (name, kind) in ["tensorsketch", "kronecker", "grass", "factgrass"].into_iter().zip(KINDS) {
        assert_eq!(Kind::named(name, 1).unwrap(), kind);
    }
}
