//! From gathered facts to the range that a read is in.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmafx_bypass::cache::pieces::Pieces;
use vmafx_bypass::cache::proof::{
    self, Facts, Fingerprint, Metadata, MountFacts, Tie, Timestamp, WritableFacts,
};
use vmafx_bypass::cache::ranges::{Place, Ranges};
use vmafx_bypass::cache::trail::Trail;

use crate::{Numbers, RANGE, RANGES, ranges};

/// Bytes of a piece at most: the reader's.
const WINDOW: u64 = 16 << 20;

fn cached(count: u64) -> Ranges {
    Ranges::from_sorted(&ranges(count), u64::MAX).expect("sorted")
}

/// A read's search of the piece that it begins in, at random, and the fstat(2) that
/// each read pays beside it.
pub fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    let file = tempfile::tempfile().expect("a temporary file");
    group.bench_function("fstat", |b| b.iter(|| rustix::fs::fstat(&file)));
    for count in RANGES {
        let pieces = Pieces::of(&cached(count), WINDOW);
        assert_eq!(pieces.len() as u64, count);
        let mut numbers = Numbers(1);
        let mut found = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                let offset = numbers.next(count, found) * 2 * RANGE + RANGE / 2;
                let Place::In(index) = black_box(&pieces).place(offset) else {
                    unreachable!("{offset} is in a range");
                };
                found = index as u64;
                found
            });
        });
    }
    group.finish();
}

/// What is proven, cut into pieces: once a proof.
pub fn pieces(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pieces");
    for count in RANGES {
        let ranges = cached(count);
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| Pieces::of(black_box(&ranges), WINDOW));
        });
    }
    group.finish();
}

/// Facts that hold.
fn facts(count: u64, read_only: bool) -> Facts {
    let size = count * 2 * RANGE;
    let modified = Timestamp {
        seconds: 1_700_000_000,
        nanos: 123_456_789,
    };
    Facts {
        mount: MountFacts {
            read_only,
            shared_with: None,
            kernel: (6, 18),
        },
        fuse_size: size,
        fuse_modified: modified,
        tie: Tie::HeldByDaemon,
        data_size: size,
        data_links: 1,
        data_fs: 0xef53,
        data_block: 4096,
        metadata: Metadata {
            size,
            ranges: cached(count),
            dirty: false,
            fingerprint: Some(Fingerprint {
                size,
                modified: Some(modified),
            }),
        },
        pulled: false,
        writable: (!read_only).then_some(WritableFacts {
            settled: true,
            unwritten_pages: 0,
        }),
    }
}

/// Every gate, and the ranges that may be read: once a proof.
pub fn prove(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prove");
    for (kind, read_only) in [("read-only", true), ("writable", false)] {
        for count in RANGES {
            let facts = facts(count, read_only);
            group.throughput(Throughput::Elements(count));
            group.bench_function(BenchmarkId::new(kind, count), |b| {
                b.iter(|| {
                    let proof = proof::prove(black_box(&facts), &mut Trail::off());
                    proof.expect("the facts hold")
                });
            });
        }
    }
    group.finish();
}
