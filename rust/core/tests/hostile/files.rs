//! Files of rows.

use std::path::PathBuf;

use half::f16;
use whence_core::search::{self, Request, Rows, Sides};
use whence_core::stop::{Asker, Watch, never};
use whence_core::store::blocks::{self, BLOCK};
use whence_core::store::{Cursor, Kind, Shard};

use super::choices::Choices;
use super::fine;

const KINDS: [Kind; 6] = [Kind::F32, Kind::F16, Kind::I8, Kind::I4, Kind::I2, Kind::I1];

/// The file of this process and thread: written anew for each input.
fn path(number: usize) -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    let name = format!("whence-hostile-{}-{thread}-{number}", std::process::id());
    std::env::temp_dir().join(name)
}

/// A file that is gone when it is dropped.
struct File {
    path: PathBuf,
}

impl File {
    fn new(number: usize, bytes: &[u8]) -> Self {
        let path = path(number);
        std::fs::write(&path, bytes).unwrap();
        Self { path }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

fn checksums(bytes: &[u8]) -> Vec<u32> {
    blocks::checksums(bytes, &Watch::none()).unwrap()
}

/// A value of a row as its bytes say, by the definition of each kind.
fn value(kind: Kind, row: &[u8], column: usize) -> f32 {
    let code = |bits: usize| {
        let code = row[column * bits / 8] >> (column * bits % 8) & ((1 << bits) - 1);
        2.0 * f32::from(code) - f32::from((1u8 << bits) - 1)
    };
    match kind {
        Kind::F32 => f32::from_le_bytes(std::array::from_fn(|at| row[4 * column + at])),
        Kind::F16 => f16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32(),
        Kind::I8 => f32::from(row[column].cast_signed()),
        Kind::I4 => code(4),
        Kind::I2 => code(2),
        Kind::I1 => code(1),
    }
}

/// Opens a file of rows, with what is said of it right or not, and reads any of them: what comes is
/// what was written, or nothing.
pub(super) fn read_rows(choices: &mut Choices<'_>) {
    let kind = KINDS[choices.below(6)];
    let widest = [8, 300, 100_000][choices.below(3)];
    let dim = 1 + choices.below(widest);
    let width = kind.row_bytes(dim).unwrap();
    let offset = choices.below(200);
    let most = if choices.once_in(8) { 3 * BLOCK } else { 600 };
    let rows = choices.below(most / width + 2);
    let written = choices.noise(offset + rows * width);
    let mut sums = choices.once_in(4).then(Vec::new).or(Some(checksums(&written)));
    if choices.once_in(4) {
        sums = None;
    } else if let Some(sums) = &mut sums {
        choices.spoil(sums);
    }
    let mut bytes = written.clone();
    choices.spoil(&mut bytes);
    let file = File::new(0, &bytes);
    let right = (offset as u64, rows as u64, dim as u64);
    let (offset, rows, dim) =
        (choices.about(right.0), choices.about(right.1), choices.about(right.2) as usize);
    let checked = sums.is_some();
    let Some(shard) = fine(Shard::in_file(&file.path, offset, rows, dim, kind, sums)) else {
        return;
    };
    assert!(dim > 0);
    let mapped = choices.once_in(2);
    let Some(shard) = (if mapped { fine(shard.mapped()) } else { Some(shard) }) else { return };
    let width = kind.row_bytes(dim).unwrap();
    let mut cursor = Cursor::default();
    for _ in 0..=choices.below(4) {
        if !mapped && choices.once_in(8) {
            // Cut, or changed, under the reader's hands. What it has checked it may go on to trust.
            choices.spoil(&mut bytes);
            std::fs::write(&file.path, &bytes).unwrap();
            cursor = Cursor::default();
            for _ in 0..2 {
                let mut out = vec![0.0; choices.below(5000)];
                fine(shard.read(choices.about(0), &mut out, &mut cursor, &Watch::none()));
            }
            return;
        }
        let first = choices.below(rows as usize % 1000 + 1) as u64;
        let first = choices.about(first);
        let count = choices.below((20_000 / dim).min(1000) + 2);
        let mut out = vec![f32::NAN; count * dim.min(1 << 20)];
        let count = out.len() / dim;
        let lent = fine(shard.lent(first, count, &Watch::none())).flatten().map(<[f32]>::to_vec);
        if fine(shard.read(first, &mut out, &mut cursor, &Watch::none())).is_none() {
            continue;
        }
        assert!(first + count as u64 <= rows);
        let begin = offset as usize + first as usize * width;
        let here = &bytes[begin..begin + count * width];
        if checked && right == (offset, rows, dim as u64) {
            assert_eq!(here, &written[begin..begin + count * width]);
        }
        for (row, out) in here.chunks_exact(width).zip(out.chunks_exact(dim)) {
            for (column, found) in out.iter().enumerate() {
                let expected = value(kind, row, column);
                assert!(*found == expected || expected.is_nan() && found.is_nan());
            }
        }
        if let Some(lent) = lent {
            let read = &out[..count * dim];
            assert_eq!(bytemuck::cast_slice::<_, u32>(&lent), bytemuck::cast_slice::<_, u32>(read));
        }
    }
}

/// Rows of several files and of memory, searched with arrays that fit or do not.
pub(super) fn search_rows(choices: &mut Choices<'_>) {
    let kind = KINDS[choices.below(6)];
    let dim = 1 + choices.below(70);
    let width = kind.row_bytes(dim).unwrap();
    let (mut files, mut shards, mut total) = (Vec::new(), Vec::new(), 0);
    for number in 0..choices.below(4) {
        let rows = choices.below(60);
        let mut bytes = choices.noise(rows * width);
        if kind == Kind::F32 && !choices.once_in(3) {
            let values = choices.values(rows * dim);
            bytes = bytemuck::cast_slice(&values).to_vec();
        }
        let mut sums = checksums(&bytes);
        choices.spoil(&mut sums);
        let file = File::new(number, &bytes);
        let dim = if choices.once_in(16) { dim + 1 } else { dim };
        let sums = choices.once_in(2).then_some(sums);
        let shard = fine(Shard::in_file(&file.path, 0, rows as u64, dim, kind, sums));
        files.push(file);
        let Some(shard) = shard else { continue };
        total += rows;
        shards.push(shard);
    }
    let mut kinds = usize::from(!shards.is_empty());
    if choices.once_in(4) {
        kinds += usize::from(kind != Kind::F32);
        let dim = choices.about(dim as u64) as usize;
        let rows = choices.below(9);
        let shard = Shard::in_memory(choices.values(rows * dim.min(500)), dim);
        total += shard.rows() as usize;
        shards.push(shard);
    }
    let mut scales = choices.values(total);
    choices.spoil(&mut scales);
    let Some(rows) = fine(Rows::new(shards, scales, choices.about(dim as u64) as usize)) else {
        return;
    };
    let (dim, total) = (rows.dim(), rows.len());
    let asker = &Asker::new(&never);
    let number = |_| {
        let number = choices.below(total as usize + 1) as u64;
        if number == total { choices.about(number) } else { number }
    };
    let numbers: Vec<u64> = (0..40).map(number).collect();
    let numbers = &numbers[..choices.below(40)];
    let known = numbers.iter().all(|&number| number < total);
    if let Some(values) = fine(rows.scaled(numbers, &Watch::none())) {
        assert!(known && values.len() == numbers.len() * dim);
        let gathered = fine(rows.gathered(numbers, &Watch::none()));
        assert!(gathered.is_some() || kinds > 1);
        if let Some(gathered) = gathered {
            assert_eq!(gathered.len(), numbers.len() as u64);
            let all: Vec<u64> = (0..gathered.len()).collect();
            let again = gathered.scaled(&all, &Watch::none()).unwrap();
            assert!(again.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
    if let Some(norms) = fine(rows.norms(1, asker)) {
        assert!(norms.len() as u64 == total && norms.iter().all(|norm| norm.is_finite()));
    }
    let checkpoints = 1 + choices.below(2);
    let examples = choices.about(total / checkpoints as u64) as usize;
    fine(rows.digest(numbers, (checkpoints, examples), choices.below(100), 1, asker));
    let count = choices.below(4);
    let mut queries = choices.values(checkpoints * count * dim);
    choices.spoil(&mut queries);
    let mut all: Vec<u64> = (0..total / checkpoints as u64 * checkpoints as u64).collect();
    choices.spoil(&mut all);
    let mut norms = if choices.once_in(2) { vec![2.0; examples.min(400)] } else { Vec::new() };
    choices.spoil(&mut norms);
    let mut excluded: Vec<Vec<u64>> = Vec::new();
    if choices.once_in(4) {
        excluded = (0..choices.below(4)).map(|_| vec![choices.word(), 0, 5, 1, 1]).collect();
    }
    let segment = |choices: &mut Choices<'_>| {
        let (left, right) = (choices.below(dim + 1), choices.below(dim + 1));
        (choices.about(left as u64) as usize, choices.about(right as u64) as usize)
    };
    let segments: Vec<_> = match choices.below(4) {
        0 => (0..choices.below(4)).map(|_| segment(choices)).collect(),
        1 => vec![(dim / 2, dim - dim / 2)],
        _ => Vec::new(),
    };
    let request = Request {
        rows: if choices.once_in(2) { &all } else { &[] },
        examples,
        queries: &queries,
        count,
        k: choices.about(3) as usize,
        sides: Sides { largest: choices.once_in(2), smallest: choices.once_in(2) },
        excluded: &excluded,
        norms: &norms,
        segments: &segments,
    };
    let found = fine(search::ends(&rows, &request, 1 + choices.below(2), asker));
    for ends in found.into_iter().flatten() {
        for hits in [ends.largest, ends.smallest] {
            assert!(hits.len() <= request.k.min(examples));
            for hit in hits {
                assert!(hit.score.is_finite() && hit.example < examples as u64);
            }
        }
    }
}

/// Files that are looked at block by block, of which exactly those that changed are found.
pub(super) fn check_files(choices: &mut Choices<'_>) {
    let size = [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5][choices.below(7)];
    let mut bytes = choices.noise(size);
    let written = bytes.clone();
    let mut sums = checksums(&bytes);
    choices.spoil(&mut sums);
    choices.spoil(&mut bytes);
    let file = File::new(0, &bytes);
    let length = choices.about(written.len() as u64);
    let found = blocks::check_file(&file.path, length, &sums, 2, &Asker::new(&never));
    let Some(bad) = fine(found) else {
        assert!(length != bytes.len() as u64 || sums.len() != bytes.len().div_ceil(BLOCK));
        return;
    };
    assert_eq!((length, sums.len()), (bytes.len() as u64, bytes.len().div_ceil(BLOCK)));
    let expected = bytes.chunks(BLOCK).zip(&sums).enumerate();
    let expected: Vec<u64> = expected
        .filter(|(_, (block, sum))| crc32fast::hash(block) != **sum)
        .map(|(number, _)| number as u64)
        .collect();
    assert_eq!(bad, expected);
}
