//! Line charts as inline SVG: text and axes in the page's own colour, so that they
//! are readable in light, dark and print.

use std::fmt::Write;

use super::html::escaped;
use crate::output::{human_bytes, human_ns};

/// The drawing's size, in units of which a phone's screen has about as many.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 220.0;
/// Around what is drawn: for the labels of the axes, of which the last one below
/// is as far beyond the frame as within.
const LEFT: f64 = 60.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 42.0;
/// More than a letter's width.
const LETTER: f64 = 8.0;

/// One engine's line.
pub struct Line {
    /// The style's class, and the name in the tooltip.
    pub name: &'static str,
    /// In the chart's units.
    pub points: Vec<(f64, f64)>,
}

/// A scale of one axis.
pub struct Axis {
    pub title: String,
    /// Where a grid line is, and what is written there.
    pub ticks: Vec<(f64, String)>,
    pub low: f64,
    pub high: f64,
    pub logarithmic: bool,
}

/// A label as short as it can be: `2 GiB`.
fn short(label: &str) -> String {
    label.replace(".00 ", " ").replace(".0 ", " ")
}

impl Axis {
    /// Of bytes a second, from 0 on.
    pub fn bytes(most: f64) -> Self {
        // Three to six lines, at what has a short name in binary units.
        let step = (most / 3.0).max(1.0).log2().floor().exp2();
        let lines = (most / step).ceil();
        let ticks = (0..=lines as u64).map(|line| line as f64 * step);
        Self {
            title: "bytes a second".into(),
            ticks: ticks
                .map(|value| (value, short(&human_bytes(value as u64))))
                .collect(),
            low: 0.0,
            high: lines * step,
            logarithmic: false,
        }
    }

    /// Of times in nanoseconds, at least a power of ten.
    pub fn times(low: f64, high: f64) -> Self {
        let high = high.max(low * 10.0);
        let at = |factors: &[f64]| -> Vec<f64> {
            let powers = (0..12).map(|power| 10_f64.powi(power));
            let all = powers.flat_map(|power| factors.iter().map(move |factor| factor * power));
            all.filter(|ns| (low..=high).contains(ns)).collect()
        };
        let mut ticks = at(&[1.0]);
        if ticks.len() < 2 {
            ticks = at(&[1.0, 2.0, 5.0]);
        }
        Self {
            title: "time of one read, logarithmic".into(),
            ticks: ticks
                .into_iter()
                .map(|ns| (ns, short(&human_ns(ns as u64))))
                .collect(),
            low,
            high,
            logarithmic: true,
        }
    }

    /// From 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let (value, low, high) = if self.logarithmic {
            (value.ln(), self.low.ln(), self.high.ln())
        } else {
            (value, self.low, self.high)
        };
        ((value - low) / (high - low).max(f64::EPSILON)).clamp(0.0, 1.0)
    }
}

/// Draws a chart; `label` is for who does not see it.
pub fn lines(label: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let at_x = |value: f64| LEFT + x.place(value) * (WIDTH - LEFT - RIGHT);
    let at_y = |value: f64| HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM);
    let (left, bottom) = (LEFT, HEIGHT - BOTTOM);
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escaped(label)
    );
    for (value, text) in &y.ticks {
        let place = at_y(*value);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{place:.1}\" y2=\"{place:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            left - 8.0,
            place + 3.5,
            escaped(text)
        );
    }
    let mut taken = 0.0;
    for (value, text) in &x.ticks {
        let place = at_x(*value);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{place:.1}\" x2=\"{place:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>"
        );
        let half = text.chars().count() as f64 * LETTER / 2.0;
        // A label is left out where the one before is in its way.
        if place - half >= taken {
            taken = place + half;
            let _ = write!(
                out,
                "<text x=\"{place:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                escaped(text)
            );
        }
    }
    let _ = write!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(left, WIDTH - RIGHT),
        HEIGHT - 6.0,
        escaped(&x.title)
    );
    let _ = write!(out, "<text x=\"0\" y=\"11\">{}</text>", escaped(&y.title));
    for line in lines {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|(px, py)| format!("{:.1},{:.1}", at_x(*px), at_y(*py)))
            .collect();
        let _ = write!(
            out,
            "<g class=\"{}\"><title>{}</title><polyline points=\"{}\"/>",
            line.name,
            line.name,
            points.join(" ")
        );
        // Few points are measured ones, many a curve.
        if line.points.len() <= 12 {
            for (px, py) in &line.points {
                let _ = write!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                    at_x(*px),
                    at_y(*py)
                );
            }
        }
        out.push_str("</g>");
    }
    out.push_str("</svg>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_its_lines_within_its_frame() {
        let axis = |logarithmic| Axis {
            title: "a <b>".into(),
            ticks: vec![(1.0, "1".into()), (100.0, "100".into())],
            low: 1.0,
            high: 100.0,
            logarithmic,
        };
        let line = Line {
            name: "raw",
            points: vec![(1.0, 1.0), (10.0, 50.0), (1e9, -3.0)],
        };
        let svg = lines("what \"it\" is", &axis(true), &axis(false), &[line]);
        assert!(svg.contains("a &lt;b&gt;") && !svg.contains("\"it\""));
        assert!(svg.contains("points=\"60.0,178.0 198.0,"));
        // What is beyond is at the edge.
        assert!(svg.contains(" 336.0,178.0\""), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 3);
    }
    #[test]
    fn labels_are_short_and_not_in_each_others_way() {
        let labels = |axis: &Axis| -> Vec<String> {
            let texts = axis.ticks.iter().map(|(_, text)| text.clone());
            texts.collect()
        };
        let axis = Axis::bytes(3.6 * 1024.0 * 1024.0 * 1024.0);
        assert_eq!(labels(&axis), ["0 B", "1 GiB", "2 GiB", "3 GiB", "4 GiB"]);
        assert_eq!(labels(&Axis::bytes(1.0)), ["0 B", "1 B"]);
        let axis = Axis::times(1_500.0, 2_000.0);
        assert_eq!(labels(&axis), ["2 us", "5 us", "10 us"]);
        let axis = Axis::times(50.0, 2e9);
        assert_eq!(axis.ticks.len(), 8);
        let svg = lines("", &axis, &Axis::bytes(1.0), &[]);
        assert!(svg.contains(">100 ns<") && !svg.contains(">1 us<"), "{svg}");
    }
}
