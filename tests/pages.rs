//! `bench --format html` in a browser: in light and dark, on a phone and on paper.
//! The screenshots stay in the target folder's `tmp/pages`.
#![allow(clippy::unwrap_used)]

#[path = "pages/browser.rs"]
mod browser;
mod common;
#[path = "pages/picture.rs"]
mod picture;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use browser::{Browser, LIMIT, Screen};
use common::{need_root, program, stderr};
use picture::{Colour, Picture, contrast, luminance};
use serde::Deserialize;
use serde_json::json;

const STYLE: &str = include_str!("../src/commands/bench/report.css");
/// The page's engines.
const SHOWN: [&str; 4] = ["fuse", "bypass", "mmap", "raw"];
/// All that have a colour.
const ENGINES: [&str; 13] = [
    "fuse",
    "bypass",
    "handover",
    "bufread",
    "mmap",
    "raw",
    "copy",
    "mount",
    "mount_ranges",
    "io_uring",
    "exec",
    "preload",
    "fuse_tuned",
];
const DESKTOP: Screen = Screen {
    width: 1280,
    phone: false,
    dark: false,
    print: false,
};
const DARK: Screen = Screen {
    dark: true,
    ..DESKTOP
};
const PHONE: Screen = Screen {
    width: 390,
    phone: true,
    ..DESKTOP
};
/// A4 between its margins, for who prefers dark.
const PAPER: Screen = Screen {
    width: 718,
    print: true,
    ..DARK
};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("pages")
        .join(name)
}

/// A page, made once for all tests.
static PAGE: LazyLock<PathBuf> = LazyLock::new(|| {
    need_root();
    let page = file("bench.html");
    fs::create_dir_all(page.parent().unwrap()).unwrap();
    let output = program()
        .args(["bench", "--generate=4MiB", "--runs=2", "-q"])
        .args(["--block-size=4KiB,64KiB", "--streams=1,2", "--gate=0.001"])
        .args(["--pattern=sequential,random,open", "--format=html"])
        .arg(format!("--engines={}", SHOWN.join(",")))
        .arg("--output")
        .arg(&page)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    page
});

/// Left, top, right and bottom.
type Box4 = [f64; 4];

fn overlap(one: Box4, other: Box4) -> bool {
    one[0] < other[2] && other[0] < one[2] && one[1] < other[3] && other[1] < one[3]
}

/// What `survey.js` tells.
#[derive(Deserialize)]
struct Survey {
    width: f64,
    scroll: f64,
    texts: Vec<Label>,
    bars: Vec<Bar>,
    tracks: Vec<Box4>,
    charts: Vec<Box4>,
    tables: Vec<[f64; 2]>,
}

#[derive(Deserialize, Debug)]
struct Label {
    text: String,
    colour: Colour,
    behind: Colour,
    size: f64,
    #[serde(rename = "box")]
    place: Box4,
    scrolls: bool,
    /// The chart that it is of, or -1.
    group: i32,
}

#[derive(Deserialize)]
struct Bar {
    engine: String,
    #[serde(rename = "box")]
    place: Box4,
}

impl Survey {
    fn of(browser: &mut Browser) -> Self {
        let found = browser.evaluate(include_str!("pages/survey.js"));
        let survey: Self = serde_json::from_value(found).unwrap();
        // Three patterns of two block sizes, four engines, one reader and two.
        assert_eq!(survey.bars.len(), 3 * 2 * 4 * 2);
        assert_eq!(survey.charts.len(), 2 * 3 + 2 * 2);
        assert_eq!(survey.tables.len(), 3);
        survey
    }

    /// What holds on each screen.
    fn is_readable(&self, least_size: f64) {
        assert!(
            self.scroll <= self.width,
            "{} of {}",
            self.scroll,
            self.width
        );
        for text in &self.texts {
            let told = contrast(text.colour, text.behind);
            assert!(told >= 4.5, "a contrast of {told}: {text:?}");
            // Rounding aside.
            assert!(text.size >= least_size - 0.1, "too small: {text:?}");
            let [left, _, right, _] = text.place;
            assert!(
                text.scrolls || (left >= 0.0 && right <= self.width),
                "beyond {}: {text:?}",
                self.width
            );
        }
        self.no_label_is_in_the_way();
    }

    fn no_label_is_in_the_way(&self) {
        let labels: Vec<&Label> = self.texts.iter().filter(|text| text.group >= 0).collect();
        for (at, one) in labels.iter().enumerate() {
            for other in &labels[at + 1..] {
                assert!(!overlap(one.place, other.place), "{one:?} and {other:?}");
            }
            for track in &self.tracks {
                assert!(!overlap(one.place, *track), "{one:?} and a bar");
            }
            // Cut off where it leaves the chart's box.
            for chart in self.charts.iter().filter(|c| overlap(**c, one.place)) {
                let inside = one.place[0] >= chart[0] && one.place[2] <= chart[2];
                assert!(inside, "{one:?} is cut off at {chart:?}");
            }
        }
    }
}

/// An engine's colour as the style has it: the dark one comes second.
fn defined(engine: &str, dark: bool) -> Colour {
    let rule = format!(".{engine} {{ --engine: #");
    let after = STYLE.split(&rule).nth(1 + usize::from(dark)).unwrap();
    let digits = after.split(' ').next().unwrap();
    let short = digits.len() == 3;
    let channel = |at: usize| {
        let digits = if short {
            digits[at..=at].repeat(2)
        } else {
            digits[2 * at..2 * at + 2].to_owned()
        };
        u8::from_str_radix(&digits, 16).unwrap()
    };
    [channel(0), channel(1), channel(2)]
}

fn is_drawn(survey: &Survey, picture: &Picture, dark: bool) {
    for bar in &survey.bars {
        let [left, top, right, bottom] = bar.place;
        // The slowest may be narrower than a pixel.
        if right - left >= 3.0 {
            let middle = picture.at(f64::midpoint(left, right), f64::midpoint(top, bottom));
            assert_eq!(middle, defined(&bar.engine, dark), "{}", bar.engine);
        }
    }
    for engine in SHOWN {
        let colour = defined(engine, dark);
        // Of lines that are close, one hides another.
        let charts = survey.charts.iter();
        let mut drawn =
            charts.filter(|chart| picture.within(**chart).filter(|c| *c == colour).count() > 20);
        assert!(drawn.next().is_some(), "{engine}'s lines");
    }
}

#[test]
fn light_and_dark_are_as_the_reader_prefers() {
    let mut browser = Browser::start(LIMIT);
    for (name, screen) in [("light.png", DESKTOP), ("dark.png", DARK)] {
        let asked = browser.show(&PAGE, screen);
        assert_eq!(asked, [format!("file://{}", PAGE.display())]);
        let survey = Survey::of(&mut browser);
        survey.is_readable(12.0);
        for [room, needed] in &survey.tables {
            assert!(needed <= room, "a table of {needed} in {room}");
        }
        let picture = browser.picture(&file(name));
        let back = picture.at(2.0, 2.0);
        assert!(picture.margin().all(|colour| colour == back));
        let light = luminance(back);
        assert!(
            if screen.dark {
                light < 0.03
            } else {
                light > 0.9
            },
            "{light}"
        );
        let told = picture.share_told_from(back);
        assert!((0.02..0.4).contains(&told), "{told}");
        is_drawn(&survey, &picture, screen.dark);
    }
    browser.end();
}

#[test]
fn a_phone_shows_all_and_only_tables_scroll() {
    let mut browser = Browser::start(LIMIT);
    for (name, dark) in [("phone.png", false), ("phone-dark.png", true)] {
        browser.show(&PAGE, Screen { dark, ..PHONE });
        let survey = Survey::of(&mut browser);
        assert!((survey.width - 390.0).abs() < 0.5, "{}", survey.width);
        survey.is_readable(10.5);
        let picture = browser.picture(&file(name));
        is_drawn(&survey, &picture, dark);
    }
    browser.end();
}

#[test]
fn paper_is_white_and_cuts_nothing_off() {
    let mut browser = Browser::start(LIMIT);
    browser.show(&PAGE, PAPER);
    let survey = Survey::of(&mut browser);
    // Pixels of CSS: 6 points.
    survey.is_readable(8.0);
    for [room, needed] in &survey.tables {
        assert!(needed <= room, "a table of {needed} in {room}");
    }
    let picture = browser.picture(&file("print.png"));
    assert_eq!(picture.at(0.0, 0.0), [255; 3]);
    let told = picture.share_told_from([255; 3]);
    assert!((0.02..0.4).contains(&told), "{told}");
    is_drawn(&survey, &picture, false);
    let pdf = browser.pdf();
    fs::write(file("bench.pdf"), &pdf).unwrap();
    assert!(pdf.starts_with(b"%PDF"));
    let pages = pdf
        .windows(12)
        .filter(|window| window.starts_with(b"/Type /Page") && window[11] != b's');
    assert!((1..10).contains(&pages.count()));
    browser.end();
}

#[test]
fn each_engine_has_a_colour_of_its_own() {
    let mut browser = Browser::start(LIMIT);
    for screen in [DESKTOP, DARK] {
        browser.show(&PAGE, screen);
        // Lightness and two axes of colour, in which distances are as they look.
        let seen = browser.evaluate(&format!(
            "{}.map((engine) => {{
                const mark = document.body.appendChild(document.createElement('b'));
                mark.className = engine;
                mark.style.color = 'oklab(from var(--engine) l a b)';
                return getComputedStyle(mark).color.match(/-?[\\d.]+(e-\\d+)?/g).map(Number);
            }})",
            json!(ENGINES)
        ));
        let seen: Vec<[f64; 3]> = serde_json::from_value(seen).unwrap();
        // The verdict is on what the bars are on, too.
        let texts = Survey::of(&mut browser).texts;
        let verdict = texts.iter().find(|text| text.text == "Gate: pass");
        let panel = verdict.unwrap().behind;
        for (at, (engine, one)) in ENGINES.iter().zip(&seen).enumerate() {
            for (other, two) in ENGINES.iter().zip(&seen).skip(at + 1) {
                let square = |axis: usize| (one[axis] - two[axis]).powi(2);
                let apart = (square(0) + square(1) + square(2)).sqrt();
                assert!(apart >= 0.1, "{engine} and {other}: {apart}");
            }
            // WCAG's least for what is drawn.
            let told = contrast(defined(engine, screen.dark), panel);
            assert!(told >= 3.0, "{engine}: {told}");
        }
    }
    browser.end();
}

#[test]
fn a_browser_that_hangs_is_given_up_and_ended() {
    let mut browser = Browser::start(Duration::from_secs(1));
    browser.halt();
    let error = browser.call("Page.getLayoutMetrics", json!({}));
    assert!(error.unwrap_err().contains("timed out"));
    browser.end();
}
