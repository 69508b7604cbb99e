//! A report as one file that needs no network.

use std::fmt::Write;

use anyhow::Result;
use vmafx_bypass::bench::{Engine, Measurement, Pattern, Percentiles};

use super::chart::{Axis, Line, lines};
use super::described;
use super::report::Report;
use crate::output::{human_bytes, human_ns};

const STYLE: &str = include_str!("report.css");
/// Points of a curve of samples.
const CURVE: usize = 100;

/// Text for HTML, attributes included.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn title(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Sequential => "In order, the whole clip",
        Pattern::Random => "At random",
        Pattern::Open => "Open and one read",
    }
}

/// The page.
pub fn page(report: &Report<'_>) -> Result<String> {
    let environment = report.environment;
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>vmafx-bypass bench</title><style>{STYLE}</style></head><body><main>\
         <h1>vmafx-bypass bench</h1><p>linux {}, {} x {}{}; page cache {}, {} runs, interleaved.</p>",
        escaped(&environment.kernel),
        environment.cpus,
        escaped(&environment.cpu),
        escaped(&environment.with_rclone()),
        environment.page_cache,
        report.runs
    );
    verdict(&mut out, report);
    for clip in &environment.clips {
        let _ = write!(
            out,
            "<h2>{}</h2><p>{}{}</p>",
            escaped(&clip.path),
            human_bytes(clip.size),
            if clip.daemon.is_empty() {
                String::new()
            } else {
                format!(
                    ", served by <code>{}</code>",
                    escaped(&clip.daemon.join(" "))
                )
            }
        );
        for (pattern, rows) in report.by_pattern(&clip.path) {
            section(&mut out, pattern, &rows);
        }
    }
    for left in report.left_out {
        let why = escaped(&left.why);
        let _ = write!(out, "<p>Not here: {}: {why}.</p>", left.engine.name());
    }
    let json = report.json()?;
    // No string of it can end the element.
    let json = json.trim_end().replace('<', "\\u003c");
    let _ = writeln!(
        out,
        "</main><script type=\"application/json\" id=\"report\">{json}</script></body></html>"
    );
    Ok(out)
}

fn verdict(out: &mut String, report: &Report<'_>) {
    let Some(verdict) = report.gate else { return };
    let (class, text) = if verdict.pass {
        ("pass", "Gate: pass")
    } else {
        ("missed", "Gate: missed")
    };
    let _ = write!(
        out,
        "<section class=\"verdict {class}\"><h2>{text}</h2><ul>"
    );
    for check in &verdict.checks {
        let outcome = if check.pass { "pass" } else { "missed" };
        let text = escaped(&described(check));
        let _ = write!(out, "<li><b>{outcome}</b>: {text}</li>");
    }
    out.push_str("</ul></section>");
}

fn section(out: &mut String, pattern: Pattern, rows: &[&Measurement]) {
    let _ = write!(out, "<section><h3>{}</h3>", title(pattern));
    let mut streams: Vec<u32> = rows.iter().map(|row| row.streams).collect();
    streams.sort_unstable();
    streams.dedup();
    bars(out, rows);
    if pattern != Pattern::Sequential || streams.len() > 1 {
        legend(out, rows);
    }
    out.push_str("<div class=\"charts\">");
    for block_size in block_sizes(rows) {
        let of_size: Vec<&Measurement> = rows
            .iter()
            .filter(|row| row.block_size == block_size)
            .copied()
            .collect();
        if pattern != Pattern::Sequential {
            let first: Vec<_> = of_size
                .iter()
                .filter(|row| row.streams == streams[0])
                .collect();
            distribution(out, block_size, &first);
        }
        if streams.len() > 1 {
            scaling(out, block_size, &streams, &of_size);
        }
    }
    out.push_str("</div>");
    table(out, rows);
    out.push_str("</section>");
}

fn block_sizes(rows: &[&Measurement]) -> Vec<usize> {
    let mut sizes: Vec<usize> = rows.iter().map(|row| row.block_size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn legend(out: &mut String, rows: &[&Measurement]) {
    let mut engines: Vec<Engine> = Vec::new();
    for row in rows {
        if !engines.contains(&row.engine) {
            engines.push(row.engine);
        }
    }
    out.push_str("<p class=\"legend\">");
    for engine in engines {
        let name = engine.name();
        let _ = write!(out, "<span class=\"{name}\"><i></i>{name}</span> ");
    }
    out.push_str("</p>");
}

/// Throughput by block size and engine.
fn bars(out: &mut String, rows: &[&Measurement]) {
    let most = rows.iter().map(|row| row.bytes_per_s).fold(1.0, f64::max);
    for block_size in block_sizes(rows) {
        let _ = write!(
            out,
            "<figure><figcaption>Throughput in blocks of {}</figcaption><div class=\"bars\">",
            human_bytes(block_size as u64)
        );
        for row in rows.iter().filter(|row| row.block_size == block_size) {
            let name = row.engine.name();
            let streams = match row.streams {
                1 => String::new(),
                streams => format!(" ×{streams}"),
            };
            let ratio = row.ratio_to_fuse.map(|ratio| format!(", {ratio:.1}× fuse"));
            let _ = write!(
                out,
                "<div><span>{name}{streams}</span><span class=\"track\"><b class=\"{name}\" \
                 style=\"width:{:.2}%\"></b></span><span>{}/s{}</span></div>",
                row.bytes_per_s / most * 100.0,
                human_bytes(row.bytes_per_s as u64),
                ratio.unwrap_or_default()
            );
        }
        out.push_str("</div></figure>");
    }
}

/// Which share of the reads took no longer than so long.
fn distribution(out: &mut String, block_size: usize, rows: &[&&Measurement]) {
    let mut all = Vec::new();
    let (mut low, mut high) = (f64::MAX, 1.0_f64);
    for row in rows {
        let mut sorted = row.samples_ns.clone();
        sorted.sort_unstable();
        let Some(last) = sorted.len().checked_sub(1) else {
            continue;
        };
        let points = (0..=CURVE).map(|step| {
            let ns = sorted[last * step / CURVE].max(1) as f64;
            (ns, step as f64 / CURVE as f64 * 100.0)
        });
        let points: Vec<_> = points.collect();
        low = low.min(points[0].0);
        high = high.max(points[CURVE].0);
        all.push(Line {
            name: row.engine.name(),
            points,
        });
    }
    if all.is_empty() {
        return;
    }
    let percents = [0.0, 25.0, 50.0, 75.0, 90.0, 100.0];
    let y = Axis {
        title: "of the reads".into(),
        ticks: percents.map(|p| (p, format!("{p} %"))).to_vec(),
        low: 0.0,
        high: 100.0,
        logarithmic: false,
    };
    let block = human_bytes(block_size as u64);
    let label = format!("Latency of reads of {block}: which share took no longer");
    figure(
        out,
        &label,
        &lines(&label, &Axis::times(low, high), &y, &all),
    );
}

fn figure(out: &mut String, label: &str, chart: &str) {
    let _ = write!(
        out,
        "<figure><figcaption>{label}</figcaption>{chart}</figure>"
    );
}

/// Throughput by how many read at once.
fn scaling(out: &mut String, block_size: usize, streams: &[u32], rows: &[&Measurement]) {
    let most = rows.iter().map(|row| row.bytes_per_s).fold(1.0, f64::max);
    let mut all: Vec<Line> = Vec::new();
    for row in rows {
        let point = (f64::from(row.streams), row.bytes_per_s);
        match all.iter_mut().find(|line| line.name == row.engine.name()) {
            Some(line) => line.points.push(point),
            None => all.push(Line {
                name: row.engine.name(),
                points: vec![point],
            }),
        }
    }
    let x = Axis {
        title: "readers at once, logarithmic".into(),
        ticks: streams
            .iter()
            .map(|n| (f64::from(*n), n.to_string()))
            .collect(),
        low: f64::from(streams[0]),
        high: f64::from(streams[streams.len() - 1]),
        logarithmic: true,
    };
    let block = human_bytes(block_size as u64);
    let label = format!("Throughput by readers at once, blocks of {block}");
    figure(out, &label, &lines(&label, &x, &Axis::bytes(most), &all));
}

fn table(out: &mut String, rows: &[&Measurement]) {
    out.push_str(
        "<div class=\"table\"><table><thead><tr><th>block</th><th>engine</th><th>readers</th>\
         <th>p50</th><th>95 % interval</th><th>p90</th><th>p99</th><th>outliers</th>\
         <th>to fuse</th><th>half of runs</th><th>to raw</th><th>open p50</th></tr></thead><tbody>",
    );
    for row in rows {
        let ratio = |ratio: Option<f64>, digits: usize| {
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.digits$}×"))
        };
        let range = row.ratio_to_fuse_range;
        let range = range.map_or_else(
            || "-".into(),
            |[low, high]| format!("{low:.1} to {high:.1}"),
        );
        let percentiles = row.percentiles;
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{} to {}</td><td>{}</td>\
             <td>{}</td><td>{} of {}</td><td>{}</td><td>{range}</td><td>{}</td><td>{}</td></tr>",
            human_bytes(row.block_size as u64),
            row.engine.name(),
            row.streams,
            human_ns(percentiles.p50_ns),
            human_ns(row.spread.low_ns),
            human_ns(row.spread.high_ns),
            human_ns(percentiles.p90_ns),
            human_ns(percentiles.p99_ns),
            row.spread.outliers,
            row.samples_ns.len(),
            ratio(row.ratio_to_fuse, 1),
            ratio(row.ratio_to_raw, 2),
            human_ns(Percentiles::of(&row.open_ns).p50_ns),
        );
    }
    out.push_str("</tbody></table></div>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b>\"c'&"), "a&lt;b&gt;&quot;c&#39;&amp;");
    }

    #[test]
    fn each_engine_has_a_colour_in_light_and_in_dark() {
        for engine in Engine::ALL {
            let rule = format!(".{} {{ --engine: #", engine.name());
            assert_eq!(STYLE.matches(&rule).count(), 2, "{rule}");
        }
    }
}
