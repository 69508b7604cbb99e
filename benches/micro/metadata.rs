//! What rclone's metadata files cost to parse.

use std::fmt::Write;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmafx_bypass::cache::rclone::parse_metadata;

use crate::{RANGE, RANGES, ranges};

/// A metadata file of so many ranges, indented as rclone does.
fn text(count: u64) -> String {
    let size = count * 2 * RANGE;
    let mut list = String::new();
    for (index, (position, length)) in ranges(count).into_iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(
            list,
            "{comma}\n\t\t{{\n\t\t\t\"Pos\": {position},\n\t\t\t\"Size\": {length}\n\t\t}}"
        )
        .expect("a string takes it");
    }
    format!(
        "{{\n\t\"ModTime\": \"2026-11-22T22:41:11.005161025Z\",\n\
         \t\"ATime\": \"2026-11-22T22:41:12.234384943Z\",\n\
         \t\"Size\": {size},\n\t\"Rs\": [{list}\n\t],\n\
         \t\"Fingerprint\": \"{size},2026-11-22 22:41:10.665327597 +0000 UTC,\
         2cb6544a7be93b47e785a47d31803b17\",\n\t\"Dirty\": false\n}}\n"
    )
}

pub fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("metadata");
    for count in RANGES {
        let text = text(count);
        let parsed = parse_metadata(text.as_bytes()).expect("rclone's form");
        assert_eq!(parsed.ranges.spans().len() as u64, count);
        assert!(parsed.fingerprint.is_some_and(|f| f.modified.is_some()));
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| parse_metadata(black_box(text.as_bytes())));
        });
    }
    group.finish();
}
