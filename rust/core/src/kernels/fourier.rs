//! The passes of a fast Fourier transform, once for all sets.
//!
//! A transform takes the polynomial with coefficients `z` modulo `x - r` for every root `r` of
//! `x^n - 1`. A pass takes each block, a polynomial modulo `x^4m - w^4`, to four, modulo
//! `x^m - w`, `x^m + w`, `x^m - iw` and `x^m + iw`: its four parts are turned by powers of `w`,
//! then added up. So all values of a part are turned alike, and neighbours stay neighbours until
//! blocks are 16 wide. The last two passes then take 16 blocks, transposed. The order that results
//! depends on the set, and only the way back, in the same set, sees it.
//!
//! A set brings a [`Vector`]. No product is fused, and each value goes through the same operations
//! whatever the number of lanes, so all sets give the same bits.

use super::{LANES, LeafTurns, Turn};

/// `L` numbers, at most 16, on which operations work lane by lane.
pub(super) trait Vector<const L: usize>: Copy {
    fn load(values: &[f32; L]) -> Self;
    fn store(self, values: &mut [f32; L]);
    fn spread(value: f32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    /// Lane `l` of row `r` becomes lane `r` of row `l`.
    fn transpose(square: &mut [Self; L]);
}

/// The definition: four lanes, which compilers make a vector of on every machine.
impl Vector<4> for [f32; 4] {
    #[inline(always)]
    fn load(values: &[f32; 4]) -> Self {
        *values
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 4]) {
        *values = self;
    }

    #[inline(always)]
    fn spread(value: f32) -> Self {
        [value; 4]
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] - other[lane])
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * other[lane])
    }

    #[inline(always)]
    fn transpose(square: &mut [Self; 4]) {
        let rows = *square;
        *square = std::array::from_fn(|lane| rows.map(|row| row[lane]));
    }
}

/// `L` complex numbers.
#[derive(Clone, Copy)]
struct Complex<V> {
    real: V,
    imaginary: V,
}

impl<V> Complex<V> {
    #[inline(always)]
    fn load<const L: usize>(real: &[f32; L], imaginary: &[f32; L]) -> Self
    where
        V: Vector<L>,
    {
        Self { real: V::load(real), imaginary: V::load(imaginary) }
    }

    #[inline(always)]
    fn store<const L: usize>(self, real: &mut [f32; L], imaginary: &mut [f32; L])
    where
        V: Vector<L>,
    {
        self.real.store(real);
        self.imaginary.store(imaginary);
    }

    #[inline(always)]
    fn plus<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        Self { real: self.real.plus(other.real), imaginary: self.imaginary.plus(other.imaginary) }
    }

    #[inline(always)]
    fn minus<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        Self { real: self.real.minus(other.real), imaginary: self.imaginary.minus(other.imaginary) }
    }

    /// `self + i other`.
    #[inline(always)]
    fn plus_turned<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        Self { real: self.real.minus(other.imaginary), imaginary: self.imaginary.plus(other.real) }
    }

    /// `self - i other`.
    #[inline(always)]
    fn minus_turned<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        Self { real: self.real.plus(other.imaginary), imaginary: self.imaginary.minus(other.real) }
    }

    /// `self other`.
    #[inline(always)]
    fn times<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        let Self { real, imaginary } = other;
        Self {
            real: self.real.times(real).minus(self.imaginary.times(imaginary)),
            imaginary: self.real.times(imaginary).plus(self.imaginary.times(real)),
        }
    }

    /// `self` by the conjugate of `other`.
    #[inline(always)]
    fn times_conjugate<const L: usize>(self, other: Self) -> Self
    where
        V: Vector<L>,
    {
        let Self { real, imaginary } = other;
        Self {
            real: self.real.times(real).plus(self.imaginary.times(imaginary)),
            imaginary: self.imaginary.times(real).minus(self.real.times(imaginary)),
        }
    }
}

type Four<V> = [Complex<V>; 4];

/// The parts of a block, turned, to the four blocks it becomes.
#[inline(always)]
fn split<const L: usize, V: Vector<L>>([a, b, c, d]: Four<V>) -> Four<V> {
    let (even, odd) = (a.plus(c), b.plus(d));
    let (left, right) = (a.minus(c), b.minus(d));
    [even.plus(odd), even.minus(odd), left.plus_turned(right), left.minus_turned(right)]
}

/// The way back, four times too large.
#[inline(always)]
fn merge<const L: usize, V: Vector<L>>([a, b, c, d]: Four<V>) -> Four<V> {
    let (even, odd) = (a.plus(b), a.minus(b));
    let (left, right) = (c.plus(d), c.minus(d));
    [even.plus(left), odd.minus_turned(right), even.minus(left), odd.plus_turned(right)]
}

/// The root that a block is turned by, its square and its cube.
type Roots<V> = [Complex<V>; 3];

#[inline(always)]
fn turn<const L: usize, V: Vector<L>>([a, b, c, d]: Four<V>, roots: Roots<V>) -> Four<V> {
    [a, b.times(roots[0]), c.times(roots[1]), d.times(roots[2])]
}

#[inline(always)]
fn turn_back<const L: usize, V: Vector<L>>([a, b, c, d]: Four<V>, roots: Roots<V>) -> Four<V> {
    let [first, second, third] = roots;
    [a, b.times_conjugate(first), c.times_conjugate(second), d.times_conjugate(third)]
}

/// One turn in every lane.
#[inline(always)]
fn spread<const L: usize, V: Vector<L>>(turn: &Turn) -> Roots<V> {
    let root =
        |at: usize| Complex { real: V::spread(turn[at]), imaginary: V::spread(turn[at + 1]) };
    [root(0), root(2), root(4)]
}

/// A turn for each lane.
#[inline(always)]
fn gather<const L: usize, V: Vector<L>>(rows: &[[f32; LANES]; 6], from: usize) -> Roots<V> {
    let root = |at: usize| {
        let (real, imaginary) = (&rows[at].as_chunks::<L>().0, &rows[at + 1].as_chunks::<L>().0);
        Complex::load(&real[from / L], &imaginary[from / L])
    };
    [root(0), root(2), root(4)]
}

/// The two parts of a block modulo `x^2m - 1`, to two blocks; the way back is the same, twice too
/// large.
#[inline(always)]
fn halve<const L: usize, V: Vector<L>>(values: &mut [f32]) {
    let (low, high) = values.split_at_mut(values.len() / 2);
    for (low, high) in low.as_chunks_mut::<L>().0.iter_mut().zip(high.as_chunks_mut::<L>().0) {
        let (a, b) = (V::load(low), V::load(high));
        a.plus(b).store(low);
        a.minus(b).store(high);
    }
}

/// The quarters of a block.
#[inline(always)]
fn quarters<const L: usize>(values: &mut [f32]) -> [&mut [[f32; L]]; 4] {
    let (low, high) = values.split_at_mut(values.len() / 2);
    let (a, b) = low.split_at_mut(low.len() / 2);
    let (c, d) = high.split_at_mut(high.len() / 2);
    [a, b, c, d].map(|part| part.as_chunks_mut().0)
}

/// Does a pass for the quarters of a block.
#[inline(always)]
fn pass<const L: usize, V: Vector<L>>(
    real: &mut [f32],
    imaginary: &mut [f32],
    work: impl Fn(Four<V>) -> Four<V>,
) {
    let ([a, b, c, d], [e, f, g, h]) = (quarters::<L>(real), quarters::<L>(imaginary));
    let first = a.iter_mut().zip(e).zip(b.iter_mut().zip(f));
    let second = c.iter_mut().zip(g).zip(d.iter_mut().zip(h));
    for (((a, e), (b, f)), ((c, g), (d, h))) in first.zip(second) {
        let four =
            [Complex::load(a, e), Complex::load(b, f), Complex::load(c, g), Complex::load(d, h)];
        let four = work(four);
        four[0].store(a, e);
        four[1].store(b, f);
        four[2].store(c, g);
        four[3].store(d, h);
    }
}

/// Point `p` of block `b` becomes lane `b` of vector `p`.
#[inline(always)]
fn transposed<const L: usize, V: Vector<L>>(values: &[f32], columns: &mut [V; LANES]) {
    let values = values.as_chunks::<L>().0;
    let squares = LANES / L;
    for (square, columns) in columns.as_chunks_mut::<L>().0.iter_mut().enumerate() {
        for (block, column) in columns.iter_mut().enumerate() {
            *column = V::load(&values[block * squares + square]);
        }
        V::transpose(columns);
    }
}

/// The way back.
#[inline(always)]
fn transpose_back<const L: usize, V: Vector<L>>(mut columns: [V; LANES], values: &mut [f32]) {
    let values = values.as_chunks_mut::<L>().0;
    let squares = LANES / L;
    for (square, columns) in columns.as_chunks_mut::<L>().0.iter_mut().enumerate() {
        V::transpose(columns);
        for (block, column) in columns.iter().enumerate() {
            column.store(&mut values[block * squares + square]);
        }
    }
}

/// Four of the points of a leaf.
#[inline(always)]
fn take<V: Copy>(x: &[V; LANES], y: &[V; LANES], places: [usize; 4]) -> Four<V> {
    places.map(|at| Complex { real: x[at], imaginary: y[at] })
}

#[inline(always)]
fn put<V: Copy>(x: &mut [V; LANES], y: &mut [V; LANES], places: [usize; 4], four: Four<V>) {
    for (at, point) in places.into_iter().zip(four) {
        (x[at], y[at]) = (point.real, point.imaginary);
    }
}

/// The turns of a leaf: those of its blocks, and of each of the four that they become.
#[inline(always)]
fn leaf_rows(turns: &LeafTurns, at: usize) -> &[[f32; LANES]; 6] {
    &turns.as_chunks::<6>().0[at]
}

/// Adds to `sums` the square of each value of the transform; overwrites `values`.
#[inline(always)]
pub(super) fn add_squared_transform<const L: usize, V: Vector<L>>(
    turns: &[Turn],
    leaves: &[LeafTurns],
    [real, imaginary]: [&mut [f32]; 2],
    [sum_real, sum_imaginary]: [&mut [f32]; 2],
) {
    let mut size = real.len();
    if !size.ilog2().is_multiple_of(2) {
        halve::<L, V>(real);
        halve::<L, V>(imaginary);
        size /= 2;
    }
    while size > LANES {
        let blocks = real.chunks_exact_mut(size).zip(imaginary.chunks_exact_mut(size));
        for (index, ((real, imaginary), root)) in blocks.zip(turns).enumerate() {
            if index == 0 {
                pass::<L, V>(real, imaginary, split); // the root is 1
            } else {
                let roots = spread(root);
                pass::<L, V>(real, imaginary, |four| split(turn(four, roots)));
            }
        }
        size /= 4;
    }
    let values = real.chunks_exact(LANES * L).zip(imaginary.chunks_exact(LANES * L));
    let sums = sum_real.chunks_exact_mut(LANES * L).zip(sum_imaginary.chunks_exact_mut(LANES * L));
    for (index, ((real, imaginary), sums)) in values.zip(sums).enumerate() {
        let (turns, from) = (&leaves[index * L / LANES], index * L % LANES);
        let (mut x, mut y) = ([V::spread(0.0); LANES], [V::spread(0.0); LANES]);
        transposed(real, &mut x);
        transposed(imaginary, &mut y);
        let roots = gather::<L, V>(leaf_rows(turns, 0), from);
        for at in 0..4 {
            let places = [at, at + 4, at + 8, at + 12];
            let four = split(turn(take(&x, &y, places), roots));
            put(&mut x, &mut y, places, four);
        }
        let sum_real = sums.0.as_chunks_mut::<L>().0;
        let sum_imaginary = sums.1.as_chunks_mut::<L>().0;
        for block in 0..4 {
            let roots = gather::<L, V>(leaf_rows(turns, 1 + block), from);
            let places = [0, 1, 2, 3].map(|at| 4 * block + at);
            let four = split(turn(take(&x, &y, places), roots));
            for (at, point) in places.into_iter().zip(four) {
                let (real, imaginary) = (&mut sum_real[at], &mut sum_imaginary[at]);
                point.times(point).plus(Complex::load(real, imaginary)).store(real, imaginary);
            }
        }
    }
}

/// The coefficients whose transform is this, times their number.
#[inline(always)]
pub(super) fn transform_back<const L: usize, V: Vector<L>>(
    turns: &[Turn],
    leaves: &[LeafTurns],
    [real, imaginary]: [&mut [f32]; 2],
) {
    let values = real.chunks_exact_mut(LANES * L).zip(imaginary.chunks_exact_mut(LANES * L));
    for (index, (real, imaginary)) in values.enumerate() {
        let (turns, from) = (&leaves[index * L / LANES], index * L % LANES);
        let (mut x, mut y) = ([V::spread(0.0); LANES], [V::spread(0.0); LANES]);
        for block in 0..4 {
            let roots = gather::<L, V>(leaf_rows(turns, 1 + block), from);
            let (real, imaginary) = (real.as_chunks::<L>().0, imaginary.as_chunks::<L>().0);
            let places = [0, 1, 2, 3].map(|at| 4 * block + at);
            let four = places.map(|at| Complex::load(&real[at], &imaginary[at]));
            put(&mut x, &mut y, places, turn_back(merge(four), roots));
        }
        let roots = gather::<L, V>(leaf_rows(turns, 0), from);
        for at in 0..4 {
            let places = [at, at + 4, at + 8, at + 12];
            let four = turn_back(merge(take(&x, &y, places)), roots);
            put(&mut x, &mut y, places, four);
        }
        transpose_back(x, real);
        transpose_back(y, imaginary);
    }
    let mut size = 4 * LANES;
    while size <= real.len() {
        let blocks = real.chunks_exact_mut(size).zip(imaginary.chunks_exact_mut(size));
        for (index, ((real, imaginary), root)) in blocks.zip(turns).enumerate() {
            if index == 0 {
                pass::<L, V>(real, imaginary, merge);
            } else {
                let roots = spread(root);
                pass::<L, V>(real, imaginary, |four| turn_back(merge(four), roots));
            }
        }
        size *= 4;
    }
    if size == 2 * real.len() {
        halve::<L, V>(real);
        halve::<L, V>(imaginary);
    }
}
