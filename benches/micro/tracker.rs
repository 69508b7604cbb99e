//! What an event of the kernel costs the tracker's user space.

use std::hint::black_box;
use std::time::{Duration, UNIX_EPOCH};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::tracker::table::{Id, Report, Table};
use vmafx_bypass::tracker::{EventKind, RawEvent, TrackedFd};

use crate::Numbers;

/// Descriptors in the table; the last is more than `run` holds by default.
const HELD: [u64; 3] = [1, 1_000, 100_000];
/// Descriptors of one process.
const EACH: u64 = 100;
/// Reports that are made ready at once: few enough to stay in the CPU's caches.
const BATCH: BatchSize = BatchSize::NumIterations(64);

/// A record of the ring: `struct vb_event` of src/bpf/rclone_bypass.h, the path
/// behind it.
fn record(kind: u8, path: &str) -> Vec<u8> {
    let mut record = Vec::new();
    // ts, opened_at, ino, size, open_ns
    for field in [2_000_000_000_u64, 1_000_000_000, 77, 1 << 30, 200_000] {
        record.extend(field.to_ne_bytes());
    }
    // pid, tid, fd, dev, flags, own_pid, mnt_id
    for field in [4242_u32, 4243, 5, 39, 0, 1, 512] {
        record.extend(field.to_ne_bytes());
    }
    // path_off, path_len
    for field in [96, path.len() as u16] {
        record.extend(field.to_ne_bytes());
    }
    record.extend(b"ffmpeg\0\0\0\0\0\0\0\0\0\0");
    record.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(record.len(), 96);
    record.extend(path.as_bytes());
    record
}

/// A record's bytes to an event, and its end.
pub fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    let cases = [
        ("close", 3, String::new()),
        ("open, path of 40 bytes", 1, "x".repeat(40)),
        ("open, path of 4,000 bytes", 1, "x".repeat(4000)),
    ];
    for (name, kind, path) in cases {
        let record = record(kind, &path);
        let event = RawEvent::decode(&record).expect("a record");
        let shown = format!("{event:?}");
        for wanted in ["fd: 5,", "own_pid: 1,", "\"ffmpeg\"", path.as_str()] {
            assert!(shown.contains(wanted), "{wanted} in {shown}");
        }
        group.bench_function(name, |b| b.iter(|| RawEvent::decode(black_box(&record))));
    }
    group.finish();
}

/// The descriptor that is made as number `nth`.
fn made(kind: EventKind, pid: u32, fd: u32, nth: u64) -> Report {
    Report::Made {
        kind,
        tid: pid,
        id: id(pid, fd, nth),
        fd: TrackedFd {
            pid,
            own_pid: pid,
            fd,
            comm: "ffmpeg".into(),
            path: Some(format!("/rclone-mount/season/clip{nth:016}.y4m").into()),
            dev: Dev::new(0, 39),
            ino: nth,
            flags: 0,
            size: 1 << 30,
            opened_at: UNIX_EPOCH + Duration::from_nanos(nth),
            open_ns: (kind == EventKind::Open).then_some(200_000),
        },
        within: true,
    }
}

fn closed(pid: u32, fd: u32, nth: u64) -> Report {
    Report::Closed {
        id: id(pid, fd, nth),
        tid: pid,
        at: UNIX_EPOCH + Duration::from_nanos(nth),
    }
}

/// Times only have to be in order.
fn id(pid: u32, fd: u32, nth: u64) -> Id {
    let opened_at = nth;
    Id { pid, fd, opened_at }
}

/// The process, and the number in it, of a descriptor that is held.
fn held(index: u64) -> (u32, u32) {
    (1000 + (index / EACH) as u32, (index % EACH) as u32)
}

/// A table's updates, at random places; each leaves as many descriptors as before.
pub fn table(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("table");
    for count in HELD {
        let mut table = Table::default();
        for index in 0..count {
            let (pid, fd) = held(index);
            table.apply(made(EventKind::Open, pid, fd, index));
        }
        let mut numbers = Numbers(1);
        let mut nth = count;
        let mut next = || {
            nth += 1;
            let (pid, fd) = held(numbers.next(count, 0));
            (pid, fd, nth)
        };

        group.throughput(Throughput::Elements(2));
        let pairs = [
            ("open+close", EventKind::Open),
            ("dup+close", EventKind::Dup),
        ];
        for (name, kind) in pairs {
            group.bench_function(BenchmarkId::new(name, count), |b| {
                let ready = || {
                    let (pid, fd, nth) = next();
                    let fd = EACH as u32 + fd;
                    (made(kind, pid, fd, nth), closed(pid, fd, nth))
                };
                let apply = |(made, closed)| {
                    drop(table.apply(made));
                    drop(table.apply(closed));
                };
                b.iter_batched(ready, apply, BATCH);
            });
        }

        // dup2(2) on a number that is in use: one report, two changes.
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("dup2", count), |b| {
            let ready = || {
                let (pid, fd, nth) = next();
                made(EventKind::Dup, pid, fd, nth)
            };
            b.iter_batched(ready, |made| drop(table.apply(made)), BATCH);
        });

        group.bench_function(BenchmarkId::new("lookup", count), |b| {
            let mut numbers = Numbers(1);
            b.iter(|| {
                let (pid, fd) = held(numbers.next(count, 0));
                table.get(pid, fd).expect("it is held")
            });
        });
    }
    group.finish();
}
