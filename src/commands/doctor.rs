//! `doctor`: what works on this host, and why not.
//!
//! `facts` gathers and `judge` decides; what tracking needs, the tracker tells.

mod container;
mod exec;
mod facts;
mod judge;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::cache::proof::{check_file_system, check_mount};
use vmafx_bypass::cache::rclone::{Located, Locator};
use vmafx_bypass::cache::trail::Trail;
use vmafx_bypass::mounts::{Mount, MountTable};
#[cfg(feature = "ebpf")]
use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::snapshot::has_reflinks;
use vmafx_bypass::{Reason, Refusal};

use crate::cli::{DoctorArgs, Format};
use crate::exit::Exit;
use crate::output::{JsonPath, Notes, SCHEMA, escape, human_bytes, write_json};
use facts::{Facts, runs_paths_rclone};
use judge::{CheckRow, Purpose, judge};

#[derive(Serialize)]
struct Document {
    schema: u32,
    /// Whether `run` could work.
    ok: bool,
    checks: Vec<CheckRow>,
    mounts: Vec<MountRow>,
}

#[derive(Serialize)]
struct MountRow {
    #[serde(flatten)]
    path: JsonPath,
    source: String,
    dev: String,
    read_only: bool,
    /// Whether clips on it are bypassed.
    pass: bool,
    detail: String,
    remedy: Option<&'static str>,
    /// Null: not found.
    cache: Option<Cache>,
    #[serde(skip)]
    point: PathBuf,
}

/// A mount's daemon, and where it caches.
#[derive(Serialize)]
struct Cache {
    daemon: u32,
    /// What PATH's `rclone version` says, if the daemon is that program.
    rclone: Option<String>,
    /// Null: one that is not known to tell holes.
    file_system: Option<String>,
    /// Whether whole clips can be handed over without copying them.
    reflinks: bool,
    free_bytes: Option<u64>,
}

/// Looks at the host; exit 3 where `run` could not work.
pub fn run(args: &DoctorArgs, notes: &Notes) -> Result<Exit> {
    let table = MountTable::read().context("`/proc/self/mountinfo`")?;
    let facts = Facts::gather();
    let mut checks = tracking(&facts, notes);
    checks.extend(judge(&facts));
    checks.extend(args.prefix.iter().map(|prefix| on_rclone(prefix, &table)));
    let rclone = facts.rclone.as_deref().ok();
    let mounts: Vec<MountRow> = table
        .iter()
        .filter(|mount| mount.is_rclone())
        .map(|mount| look_at(mount, &table, rclone))
        .collect();
    let document = Document {
        schema: SCHEMA,
        ok: checks.iter().all(|check| check.pass || !check.needed),
        checks,
        mounts,
    };
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => write_json(&mut out, &document)?,
        Format::Text => write_text(&mut out, &document)?,
    }
    out.flush()?;
    Ok(if document.ok {
        Exit::Done
    } else {
        Exit::Environment
    })
}

/// The tracker's own checks: with the kill switch nothing is loaded or mounted.
#[cfg(feature = "ebpf")]
fn tracking(facts: &Facts, notes: &Notes) -> Vec<CheckRow> {
    let killed = facts.opt_in == OptIn::Killed;
    let why = format!("{}=0", optin::VARIABLE);
    if !killed && facts.capabilities.may_trace() {
        notes.note(format_args!(
            "note: loads and attaches BPF programs for a moment, to see which ways work; not with {why}"
        ));
    }
    let leave = killed.then_some(why.as_str());
    let checks = vmafx_bypass::tracker::checks(notes.libbpf_log(), leave);
    checks
        .into_iter()
        .map(|check| {
            let remedy = || {
                if killed && check.name.starts_with("attach") {
                    format!("unset {}, or set it to 1", optin::VARIABLE)
                } else {
                    container::remedy(facts.place, check.name)
                        .unwrap_or_else(|| check.remedy.to_owned())
                }
            };
            CheckRow {
                name: check.name,
                purpose: Purpose::Tracking,
                needed_by: match check.name {
                    "tracefs" => "run --attach tracepoint",
                    "attach_fentry" => "run --attach fentry",
                    "attach_raw" => "run --attach raw",
                    "attach_tracepoint" => "run --attach tracepoint",
                    "bpf_fs" | "pins" => "run, dump-map, top",
                    _ => "run",
                },
                pass: check.found.is_ok(),
                needed: check.needed,
                remedy: check.found.is_err().then(remedy),
                detail: check.found.unwrap_or_else(|error| error),
            }
        })
        .collect()
}

#[cfg(not(feature = "ebpf"))]
fn tracking(_: &Facts, _: &Notes) -> Vec<CheckRow> {
    vec![CheckRow {
        name: "tracker",
        purpose: Purpose::Tracking,
        needed_by: "run",
        pass: false,
        needed: true,
        detail: "this build has no tracker".into(),
        remedy: Some("build it with the cargo feature `ebpf`".into()),
    }]
}

fn on_rclone(prefix: &Path, table: &MountTable) -> CheckRow {
    let shown = escape(prefix.as_os_str());
    let resolved = std::fs::canonicalize(prefix);
    let found = match &resolved {
        Ok(path) => table.containing(path),
        Err(_) => None,
    };
    let (pass, detail) = match (&resolved, found) {
        (Err(error), _) => (false, format!("`{shown}`: {error}")),
        (Ok(_), Some(mount)) if mount.is_rclone() || mount.is_reexport() => {
            (true, format!("`{shown}` is on {}", escape(&mount.source)))
        }
        (Ok(_), mount) => {
            let fstype = mount.map_or("nothing", |mount| mount.fstype.as_str());
            (false, format!("`{shown}` is on {fstype}"))
        }
    };
    CheckRow {
        name: "prefix",
        purpose: Purpose::Tracking,
        needed_by: "run --prefix",
        pass,
        needed: true,
        detail,
        remedy: (!pass).then(|| "mount it with `rclone mount`, or start `run` with --wait".into()),
    }
}

/// Whether a mount's daemon and cache are found and may be read. `rclone` is what
/// PATH's says of its version.
fn look_at(mount: &Mount, table: &MountTable, rclone: Option<&str>) -> MountRow {
    let found = Locator::now().and_then(|locator| {
        let located = locator.locate(mount)?;
        check_mount(&located.mount_facts(), &mut Trail::off())?;
        Ok(located)
    });
    let covered = table.containing(&mount.point) != Some(mount);
    let cache = found
        .as_ref()
        .ok()
        .map(|located| Cache::of(located, rclone));
    let judged = match &found {
        Ok(_) if covered => Err(("another mount covers it".into(), None)),
        Ok(located) => readable(located).map_err(told),
        Err(refusal) => Err(told(refusal.clone())),
    };
    let (pass, detail, remedy) = match judged {
        Ok(folder) => {
            let more = cache.as_ref().map_or_else(String::new, Cache::text);
            (true, format!("cache in `{}`{more}", folder.display()), None)
        }
        Err((detail, remedy)) => (false, detail, remedy),
    };
    MountRow {
        path: JsonPath::new(Some(&mount.point)),
        source: mount.source.to_string_lossy().into_owned(),
        dev: mount.dev.to_string(),
        read_only: mount.read_only,
        pass,
        detail,
        remedy,
        cache,
        point: mount.point.clone(),
    }
}

fn told(refusal: Refusal) -> (String, Option<&'static str>) {
    let remedy = refusal.reason.remedy();
    (refusal.to_string(), Some(remedy))
}

/// The folder of a mount's cached clips, which need not be there yet.
fn readable(located: &Located) -> Result<PathBuf, Refusal> {
    let folder = located.folders.data_path(Path::new(""));
    match std::fs::read_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let what = format_args!("cache `{}`", folder.display());
            return Err(Refusal::from_io(what, &error, Reason::IoError));
        }
        _ => {}
    }
    if let Ok(found) = nix::sys::statfs::statfs(&located.cache_folder()) {
        check_file_system(found.filesystem_type().0)?;
    }
    Ok(folder)
}

impl Cache {
    fn of(located: &Located, rclone: Option<&str>) -> Self {
        let folder = located.cache_folder();
        let found = nix::sys::statfs::statfs(&folder).ok();
        let file_system = found.map(|found| check_file_system(found.filesystem_type().0));
        let pid = located.daemon.pid;
        Self {
            daemon: pid,
            rclone: rclone.filter(|_| runs_paths_rclone(pid)).map(Into::into),
            file_system: file_system.and_then(Result::ok),
            reflinks: has_reflinks(&folder),
            free_bytes: found.map(|f| f.blocks_available() * f.block_size().unsigned_abs()),
        }
    }

    /// Continues a sentence.
    fn text(&self) -> String {
        let file_system = self.file_system.as_deref().unwrap_or("unknown");
        let reflinks = if self.reflinks {
            "with reflinks"
        } else {
            "no reflinks: `exec` copies whole clips"
        };
        let free = self.free_bytes.map_or_else(String::new, |bytes| {
            format!(", {} free", human_bytes(bytes))
        });
        let version = self
            .rclone
            .as_deref()
            .unwrap_or("another rclone than PATH's");
        format!(
            " on {file_system} ({reflinks}{free}), by pid {} ({version})",
            self.daemon
        )
    }
}

fn write_text(out: &mut impl Write, document: &Document) -> io::Result<()> {
    for purpose in Purpose::ALL {
        writeln!(out, "{}", purpose.heading())?;
        let checks = document.checks.iter();
        for check in checks.filter(|check| check.purpose == purpose) {
            write_check(out, check)?;
        }
        if purpose == Purpose::Reading {
            write_mounts(out, &document.mounts)?;
        }
    }
    let verdict = if document.ok {
        "`run` can work here"
    } else {
        "`run` cannot work here: see NO above"
    };
    writeln!(out, "{verdict}")
}

fn write_check(out: &mut impl Write, check: &CheckRow) -> io::Result<()> {
    let mark = match (check.pass, check.needed) {
        (true, _) => "ok",
        (false, true) => "NO",
        (false, false) => "-",
    };
    let detail = escape(check.detail.as_ref());
    writeln!(out, "{mark:<3} {:<20} {detail}", check.name)?;
    if let Some(remedy) = &check.remedy {
        let remedy = escape(remedy.as_ref());
        writeln!(out, "    {:<20} for {}", "", check.needed_by)?;
        writeln!(out, "    {:<20} -> {remedy}", "")?;
    }
    Ok(())
}

fn write_mounts(out: &mut impl Write, mounts: &[MountRow]) -> io::Result<()> {
    if mounts.is_empty() {
        writeln!(out, "-   {:<20} none found", "rclone mounts")?;
    }
    for mount in mounts {
        let mark = if mount.pass { "ok" } else { "-" };
        let point = escape(mount.point.as_os_str());
        let detail = escape(mount.detail.as_ref());
        writeln!(
            out,
            "{mark:<3} {point} ({}): {detail}",
            escape(mount.source.as_ref())
        )?;
        if let Some(remedy) = mount.remedy {
            writeln!(out, "    {:<20} -> {remedy}", "")?;
        }
    }
    Ok(())
}
