use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::SystemTime;

use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Cell;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::tracker::{DumpError, Loss, Losses, Owner, ReadCost};

use super::*;
use crate::commands::top::app::Ask;
use crate::commands::top::look::Look;
use crate::commands::top::model::{Clip, ClipId, Facts, Picture, Process, Rate, Usage};

const PLAIN: Theme = Theme { colours: false };
const COLOURED: Theme = Theme { colours: true };

fn usage(mib: u64) -> Usage {
    let bytes = (mib << 20) as f64;
    Usage {
        total: ReadCost {
            reads: 10,
            bytes: mib << 21,
            ns: 1_500_000_000,
        },
        rate: Some(Rate {
            reads: 8.0,
            bytes,
            ns: 250_000_000.0,
        }),
    }
}

fn clip(ino: u64, path: &str, state: &'static str, cached: u64) -> Clip {
    let dev = Dev::new(0, 50);
    Clip {
        id: ClipId { dev, ino },
        facts: Facts {
            path: Some(path.into()),
            size: Some(100 << 20),
            cached: Some(cached << 20),
            state,
        },
        fds: 1,
        pids: vec![7],
        usage: Some(usage(ino)),
    }
}

fn look(clips: Vec<Clip>) -> Look {
    let process = |pid| Process {
        pid,
        comm: format!("worker\\n{pid}"),
        fds: 3,
        clips: 2,
        usage: Some(usage(pid.into())),
    };
    Look {
        at: SystemTime::UNIX_EPOCH,
        owner: Owner {
            pid: 99,
            alive: true,
            since: SystemTime::UNIX_EPOCH,
        },
        complete: true,
        settled: true,
        losses: Losses::default(),
        mounts: vec!["/mnt/a".into()],
        picture: Picture {
            fds: clips.len(),
            usage: Some(usage(3)),
            forgotten: 0,
            processes: vec![process(7), process(8)],
            clips,
        },
    }
}

fn two_clips() -> App {
    let clips = vec![
        clip(1, "/mnt/a/one.y4m", "active", 100),
        clip(2, "/mnt/a/two\n.y4m", "partial", 50),
    ];
    App::new(TopView::Clips, look(clips))
}

fn draw_at(app: &mut App, (width, height): (u16, u16), theme: Theme) -> TestBackend {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app, theme)).unwrap();
    terminal.backend().clone()
}

fn screen(app: &mut App, size: (u16, u16)) -> Vec<String> {
    let backend = draw_at(app, size, PLAIN);
    let cells = backend.buffer().content();
    let lines = cells.chunks(usize::from(size.0).max(1));
    lines
        .map(|line| line.iter().map(Cell::symbol).collect::<String>())
        .map(|line| line.trim_end().to_owned())
        .collect()
}

fn press(app: &mut App, keys: &str) -> Vec<Ask> {
    let code = |c| match c {
        '\t' => KeyCode::Tab,
        '\n' => KeyCode::Enter,
        '\x1b' => KeyCode::Esc,
        '\x08' => KeyCode::Backspace,
        c => KeyCode::Char(c),
    };
    let event = |c| KeyEvent::new(code(c), KeyModifiers::NONE);
    keys.chars().filter_map(|c| app.key(event(c))).collect()
}

#[test]
fn a_wide_terminal_has_every_column() {
    let lines = screen(&mut two_clips(), (132, 10));
    let expected = [
        "run 99: complete, since 1970-01-01T00:00:00Z",
        "2 descriptors, 2 clips, 2 processes on /mnt/a",
        "3.0 MiB/s through FUSE, 8 reads/s, 25% of the time",
        "  STATE          CACHED                SIZE   FDS  PROCS     FUSE/S  READS/S  IN FUSE     ↓TIME PATH",
        "> active         ########## 100%  100.0 MiB     1      1    1.0 MiB        8      25%    1.50 s /mnt/a/one.y4m",
        "  partial        #####.....  50%  100.0 MiB     1      1    2.0 MiB        8      25%    1.50 s /mnt/a/two\\n.y4m",
        "",
        "",
        "",
        "q quit  Tab processes  e explain  s sort  / filter  p pause  ? help",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn narrow_and_low_terminals_keep_what_matters() {
    let lines = screen(&mut two_clips(), (60, 5));
    assert_eq!(lines[0], "run 99: complete, since 1970-01-01T00:00:00Z");
    assert_eq!(lines[1], "  STATE          CACHED            FDS PATH");
    assert_eq!(
        lines[2],
        "> active         ########## 100%     1 /mnt/a/one.y4m"
    );
    assert!(lines[4].starts_with("q quit"), "{lines:?}");
    let lines = screen(&mut two_clips(), (20, 3));
    assert_eq!(lines[..2], ["  PATH", "> /mnt/a/one.y4m"]);
    let lines = screen(&mut two_clips(), (14, 1));
    assert_eq!(lines, ["> …t/a/one.y4m"]);
}

#[test]
fn keys_change_the_view() {
    let mut app = two_clips();
    let at = (100, 12);
    assert!(press(&mut app, "\t").is_empty());
    assert!(screen(&mut app, at)[3].ends_with("COMMAND"));
    assert!(screen(&mut app, at)[4].ends_with("worker\\n7"));
    // A process's own clips; process 8 has none of them.
    press(&mut app, "j\n");
    let lines = screen(&mut app, at);
    assert_eq!(lines[4], " nothing to show: Esc shows all again");
    assert!(lines[11].starts_with("only those of process 8: Esc shows all"));
    press(&mut app, "\x1b");
    assert!(screen(&mut app, at)[4].contains("one.y4m"));
    // By path, and the other way around.
    press(&mut app, "sS");
    let lines = screen(&mut app, at);
    assert!(lines[3].ends_with("PATH↓") && lines[4].contains("two"));
    // Keys are letters while a filter is typed.
    assert!(press(&mut app, "/QXX\x08\x08\x08ONE").is_empty());
    let lines = screen(&mut app, at);
    assert!(lines[4].contains("one.y4m") && lines[5].is_empty());
    assert_eq!(lines[11], "/ONE");
    press(&mut app, "\n");
    assert!(screen(&mut app, at)[11].starts_with("only those with \"ONE\""));
    press(&mut app, "\x1b");
    assert!(screen(&mut app, at)[5].contains("one.y4m"));
    assert_eq!(press(&mut app, "\x1b"), [Ask::Quit]);
    assert_eq!(press(&mut app, "q"), [Ask::Quit]);
    let control = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    press(&mut app, "/");
    assert_eq!(app.key(control), Some(Ask::Quit));
}

#[test]
fn the_chosen_clip_is_explained() {
    let mut app = two_clips();
    let path = PathBuf::from("/mnt/a/two\n.y4m");
    assert_eq!(press(&mut app, "je"), [Ask::Explain(path.clone())]);
    let waiting = screen(&mut app, (80, 24)).join("\n");
    assert!(waiting.contains("explain /mnt/a/two\\n.y4m"), "{waiting}");
    assert!(waiting.contains("FUSE may take its time"), "{waiting}");
    app.explained(&PathBuf::from("/mnt/a/other"), "of another clip".to_owned());
    let long = format!("  ok  gate            {}\n", "word ".repeat(30));
    app.explained(&path, long.repeat(20) + "the end\x1b[2J");
    let lines = screen(&mut app, (80, 24));
    assert!(lines[2].contains("ok  gate            word"), "{lines:?}");
    let below = "│                      word";
    assert!(lines[3].starts_with(below), "{lines:?}");
    assert!(!lines.join("").contains("the end"));
    // The end, and not beyond it: one up shows a line above.
    press(&mut app, "Gjj");
    let lines = screen(&mut app, (80, 24));
    assert!(lines[21].contains("the end[2J"), "{lines:?}");
    press(&mut app, "k");
    assert!(screen(&mut app, (80, 24))[21].contains("word"));
    assert_eq!(press(&mut app, "\x1b"), [Ask::Forget]);
    assert!(screen(&mut app, (80, 24))[5].starts_with("> partial"));
    // Of a process there is nothing to explain.
    assert!(press(&mut app, "\te").is_empty());
    assert!(screen(&mut app, (80, 24))[23].starts_with("choose a clip"));
}

#[test]
fn a_pause_keeps_the_rows() {
    let mut app = two_clips();
    assert_eq!(press(&mut app, "p"), [Ask::Pause(true)]);
    app.take(Ok(look(vec![])));
    let lines = screen(&mut app, (90, 12));
    assert!(lines[4].contains("one.y4m") && lines[11].starts_with("PAUSED  q quit"));
    assert_eq!(press(&mut app, " "), [Ask::Pause(false)]);
    app.take(Ok(look(vec![])));
    assert_eq!(screen(&mut app, (90, 12))[4], " no clip is open");
}

#[test]
fn losses_and_ends_are_told_in_words_and_colours() {
    let mut app = two_clips();
    let first = |app: &mut App| screen(app, (100, 12))[0].clone();
    let colour = |app: &mut App, theme| draw_at(app, (100, 12), theme).buffer()[(0, 0)].fg;
    assert_eq!(colour(&mut app, COLOURED), Color::Green);
    let mut lossy = look(vec![]);
    lossy.complete = false;
    lossy.losses = Losses::from_iter([(Loss::RingFull, 3)]);
    app.take(Ok(lossy.clone()));
    let words = "run 99: NOT COMPLETE, lost: ring_full 3, since ";
    assert!(first(&mut app).starts_with(words));
    assert_eq!(colour(&mut app, COLOURED), Color::Red);
    lossy.complete = true;
    app.take(Ok(lossy));
    assert!(first(&mut app).starts_with("run 99: complete (lost: ring_full 3), since"));
    app.take(Err(DumpError::NotRunning("/pins".into())));
    let ended = "run 99 has ended, this is its last; waiting for another";
    assert_eq!(first(&mut app), ended);
    app.take(Err(DumpError::Foreign("/pins".into())));
    assert!(first(&mut app).contains("of another version"));
    let mut dead = look(vec![]);
    dead.owner.alive = false;
    app.take(Ok(dead));
    assert!(first(&mut app).starts_with("run 99 has died"));
    // NO_COLOR: bold and reversed are none.
    let buffer = draw_at(&mut app, (100, 12), PLAIN);
    let colours: BTreeSet<_> = buffer
        .buffer()
        .content()
        .iter()
        .map(|cell| format!("{:?}{:?}", cell.fg, cell.bg))
        .collect();
    assert_eq!(colours, BTreeSet::from(["ResetReset".to_owned()]));
}

#[test]
fn without_account_a_hint_says_how_to_count() {
    let mut uncounted = look(vec![clip(1, "/mnt/a/one.y4m", "active", 100)]);
    uncounted.picture.usage = None;
    uncounted.picture.clips[0].usage = None;
    let mut app = App::new(TopView::Clips, uncounted);
    let lines = screen(&mut app, (132, 10));
    assert_eq!(lines[2], "reads are not counted: start run with --account");
    assert!(lines[4].contains("-        -        -         - /mnt"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_size_rows_or_keys_panic(
        paths in prop::collection::vec("\\PC{0,40}", 0..30),
        steps in prop::collection::vec((0_usize..16, 0_u16..140, 0_u16..30), 1..20),
        said in "(.{0,90}\n){0,30}",
    ) {
        let clips = paths.iter().enumerate().map(|(i, path)| {
            clip(i as u64, path, "active", i as u64 * 5)
        });
        let mut app = App::new(TopView::Clips, look(clips.collect()));
        for (key, width, height) in steps {
            let key = ["\t", "\n", "s", "S", "/", "e", "x", "\x1b", "\x08", "j", "k", "G", "g",
                "?", "p", "q"][key];
            for ask in press(&mut app, key) {
                if let Ask::Explain(path) = ask {
                    app.explained(&path, said.clone());
                }
            }
            screen(&mut app, (width, height));
        }
    }
}
