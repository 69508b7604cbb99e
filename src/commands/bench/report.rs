//! Results as text and JSON.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use vmafx_bypass::bench::{Engine, Measurement, Pattern, Verdict};

use super::environment::Environment;
use crate::output::{SCHEMA, escape, human_bytes};

/// A benchmark's outcome.
#[derive(Serialize)]
pub struct Report<'a> {
    schema: u32,
    environment: &'a Environment,
    runs: u32,
    results: &'a [Measurement],
    #[serde(skip_serializing_if = "Option::is_none")]
    gate: Option<&'a Verdict>,
}

impl<'a> Report<'a> {
    pub fn new(
        environment: &'a Environment,
        results: &'a [Measurement],
        gate: Option<&'a Verdict>,
        runs: u32,
    ) -> Self {
        Self {
            schema: SCHEMA,
            environment,
            runs,
            results,
            gate,
        }
    }

    pub fn json(&self) -> Result<String> {
        let mut text = serde_json::to_string(self)?;
        text.push('\n');
        Ok(text)
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let environment = self.environment;
        writeln!(
            out,
            "linux {}, {} x {}; page cache warm, {} runs, interleaved",
            environment.kernel, environment.cpus, environment.cpu, self.runs
        )?;
        for clip in &environment.clips {
            writeln!(
                out,
                "\n`{}`, {}",
                escape(clip.path.as_ref()),
                human_bytes(clip.size)
            )?;
            for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Open] {
                let of_pattern: Vec<&Measurement> = self
                    .results
                    .iter()
                    .filter(|r| r.pattern == pattern && r.path.to_string_lossy() == clip.path)
                    .collect();
                if !of_pattern.is_empty() {
                    Self::write_table(out, pattern, &of_pattern)?;
                }
            }
        }
        if let Some(verdict) = self.gate {
            writeln!(
                out,
                "\ngate: {}",
                if verdict.pass { "pass" } else { "missed" }
            )?;
            for check in &verdict.checks {
                writeln!(
                    out,
                    "  {:>9} {}: {:.1}x of at least {}x: {}",
                    human_bytes(check.block_size as u64),
                    check.pattern.name(),
                    check.ratio,
                    check.threshold,
                    if check.pass { "pass" } else { "missed" }
                )?;
            }
        }
        Ok(())
    }

    fn write_table(out: &mut String, pattern: Pattern, rows: &[&Measurement]) -> std::fmt::Result {
        let what = match pattern {
            Pattern::Sequential => "sequential, the whole clip",
            Pattern::Random => "random, one read",
            Pattern::Open => "open and one read",
        };
        writeln!(
            out,
            "\n{what:<28} {:>10} {:>10} {:>10} {:>12} {:>8} {:>8} {:>9}",
            "p50", "p90", "p99", "throughput", "to fuse", "to raw", "open p50"
        )?;
        for row in rows {
            let ratio = |ratio: Option<f64>, digits| match ratio {
                Some(ratio) => format!("{ratio:.digits$}x"),
                None => "-".to_owned(),
            };
            let percentiles = row.percentiles;
            let open = vmafx_bypass::bench::Percentiles::of(&row.open_ns).p50_ns;
            let to_raw = match row.engine {
                Engine::Fuse => 3,
                _ => 2,
            };
            writeln!(
                out,
                "  {:>9}  {:<15} {:>10} {:>10} {:>10} {:>10}/s {:>8} {:>8} {:>9}",
                human_bytes(row.block_size as u64),
                row.engine.name(),
                human_ns(percentiles.p50_ns),
                human_ns(percentiles.p90_ns),
                human_ns(percentiles.p99_ns),
                human_bytes(row.bytes_per_s as u64),
                ratio(row.ratio_to_fuse, 1),
                ratio(row.ratio_to_raw, to_raw),
                human_ns(open),
            )?;
        }
        Ok(())
    }
}

/// A duration for people: `8.2 ms`.
fn human_ns(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}
