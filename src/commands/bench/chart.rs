//! Line charts as inline SVG: text and axes in the page's own colour, so that they
//! are readable in light, dark and print.

use std::fmt::Write;

use super::html::escaped;

/// The drawing's size, in units of which a phone's screen has about as many.
const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 220.0;
/// Around what is drawn: for the labels of the axes.
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 36.0;

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

impl Axis {
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
            left - 4.0,
            place + 3.5,
            escaped(text)
        );
    }
    for (value, text) in &x.ticks {
        let place = at_x(*value);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{place:.1}\" x2=\"{place:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
             <text x=\"{place:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 14.0,
            escaped(text)
        );
    }
    let _ = write!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(left, WIDTH - RIGHT),
        HEIGHT - 6.0,
        escaped(&x.title)
    );
    let _ = write!(
        out,
        "<text transform=\"translate(10 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(TOP, bottom),
        escaped(&y.title)
    );
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
        assert!(svg.contains("points=\"46.0,184.0 218.0,"));
        // What is beyond is at the edge.
        assert!(svg.contains(" 390.0,184.0\""), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 3);
    }
}
