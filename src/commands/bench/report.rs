//! Results as text and JSON.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use vmafx_bypass::bench::{Engine, LeftOut, Measurement, Pattern, Verdict};

use super::environment::Environment;
use crate::output::{escape, human_bytes, human_ns};

/// A benchmark's outcome.
#[derive(Serialize)]
pub struct Report<'a> {
    pub schema: u32,
    pub environment: &'a Environment,
    pub runs: u32,
    pub results: &'a [Measurement],
    pub left_out: &'a [LeftOut],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<&'a Verdict>,
}

impl Report<'_> {
    /// A clip's results, by the patterns that were measured.
    pub fn by_pattern<'b>(
        &'b self,
        clip: &'b str,
    ) -> impl Iterator<Item = (Pattern, Vec<&'b Measurement>)> {
        let patterns = [Pattern::Sequential, Pattern::Random, Pattern::Open];
        let with_rows = patterns.into_iter().map(move |pattern| {
            let of_pattern =
                |r: &&Measurement| r.pattern == pattern && r.path.to_string_lossy() == clip;
            (pattern, self.results.iter().filter(of_pattern).collect())
        });
        with_rows.filter(|(_, rows): &(_, Vec<_>)| !rows.is_empty())
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
            "linux {}, {} x {}{}; page cache {}, {} runs, interleaved",
            environment.kernel,
            environment.cpus,
            environment.cpu,
            environment.with_rclone(),
            environment.page_cache,
            self.runs
        )?;
        for clip in &environment.clips {
            writeln!(
                out,
                "\n`{}`, {}",
                escape(clip.path.as_ref()),
                human_bytes(clip.size)
            )?;
            for (pattern, rows) in self.by_pattern(&clip.path) {
                Self::write_table(out, pattern, &rows)?;
            }
        }
        for left in self.left_out {
            let (engine, clip) = (left.engine.name(), escape(left.path.as_ref()));
            writeln!(out, "\nnot here: {engine} for `{clip}`: {}", left.why)?;
        }
        if let Some(verdict) = self.gate {
            writeln!(
                out,
                "\ngate: {}",
                if verdict.pass { "pass" } else { "missed" }
            )?;
            for check in &verdict.checks {
                let outcome = if check.pass { "pass" } else { "missed" };
                writeln!(out, "  {outcome}: {}", super::described(check))?;
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
            "\n{what:<31} {:>9} {:>9} {:>9} {:>9} {:>12} {:>7} {:>16} {:>7} {:>9}",
            "p50",
            "mad",
            "p90",
            "p99",
            "throughput",
            "to fuse",
            "half of runs",
            "to raw",
            "open p50"
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
            let range = match row.ratio_to_fuse_range {
                Some([low, high]) if row.engine != Engine::Fuse => format!("{low:.1} to {high:.1}"),
                _ => "-".to_owned(),
            };
            let streams = match row.streams {
                1 => String::new(),
                streams => format!(" x{streams}"),
            };
            writeln!(
                out,
                "  {:>9}  {:<18} {:>9} {:>9} {:>9} {:>9} {:>10}/s {:>7} {range:>16} {:>7} {:>9}",
                human_bytes(row.block_size as u64),
                format!("{}{streams}", row.engine.name()),
                human_ns(percentiles.p50_ns),
                human_ns(row.spread.mad_ns),
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
