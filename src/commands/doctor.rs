//! `doctor`: what works on this host, and why not.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::cache::proof::check_mount;
use vmafx_bypass::cache::rclone::Locator;
use vmafx_bypass::cache::trail::Trail;
use vmafx_bypass::mounts::{Mount, MountTable};
use vmafx_bypass::optin::{self, OptIn};

use crate::cli::{DoctorArgs, Format};
use crate::exit::Exit;
use crate::output::{JsonPath, Notes, SCHEMA, escape, write_json};

#[derive(Serialize)]
struct Document {
    schema: u32,
    /// Whether `run` could work.
    ok: bool,
    checks: Vec<CheckRow>,
    mounts: Vec<MountRow>,
}

#[derive(Serialize)]
struct CheckRow {
    name: &'static str,
    pass: bool,
    /// Whether `run` needs it.
    needed: bool,
    detail: String,
    /// Null: it passes.
    remedy: Option<String>,
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
    #[serde(skip)]
    point: PathBuf,
}

/// Looks at the host; exit 3 where `run` could not work.
pub fn run(args: &DoctorArgs, notes: &Notes) -> Result<Exit> {
    let table = MountTable::read().context("`/proc/self/mountinfo`")?;
    let mut checks = host_checks(notes);
    checks.push(opted_in());
    checks.extend(args.prefix.iter().map(|prefix| on_rclone(prefix, &table)));
    let mounts: Vec<MountRow> = table
        .iter()
        .filter(|mount| mount.is_rclone())
        .map(|mount| look_at(mount, &table))
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

#[cfg(feature = "ebpf")]
fn host_checks(notes: &Notes) -> Vec<CheckRow> {
    let checks = vmafx_bypass::tracker::checks(notes.libbpf_log()).into_iter();
    checks
        .map(|check| CheckRow {
            name: check.name,
            pass: check.found.is_ok(),
            needed: check.needed,
            remedy: check.found.is_err().then(|| check.remedy.to_owned()),
            detail: check.found.unwrap_or_else(|error| error),
        })
        .collect()
}

#[cfg(not(feature = "ebpf"))]
fn host_checks(_: &Notes) -> Vec<CheckRow> {
    vec![CheckRow {
        name: "tracker",
        pass: false,
        needed: true,
        detail: "this build has no tracker".into(),
        remedy: Some("build it with the cargo feature `ebpf`".into()),
    }]
}

fn opted_in() -> CheckRow {
    let variable = optin::VARIABLE;
    let (pass, detail, remedy) = match optin::from_env() {
        OptIn::Yes => (true, format!("{variable}=1"), None),
        OptIn::Unset => (
            false,
            format!("{variable} is not set: `run` refuses to start"),
            Some(format!("set {variable}=1, or start `run` with --enable")),
        ),
        OptIn::Killed => (
            false,
            format!("{variable}=0: nothing is tracked or bypassed"),
            Some(format!("unset {variable}, or set it to 1")),
        ),
    };
    CheckRow {
        name: "opt_in",
        pass,
        needed: false,
        detail,
        remedy,
    }
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
        pass,
        needed: true,
        detail,
        remedy: (!pass).then(|| "mount it with `rclone mount`, or start `run` with --wait".into()),
    }
}

/// Whether a mount's daemon and cache are found and may be read.
fn look_at(mount: &Mount, table: &MountTable) -> MountRow {
    let found = Locator::with(|locator| locator.locate(mount)).and_then(|located| {
        check_mount(&located.mount_facts(), &mut Trail::off())?;
        Ok(located)
    });
    let covered = table.containing(&mount.point) != Some(mount);
    let (pass, detail, remedy) = match found {
        Ok(_) if covered => (false, "another mount covers it".into(), None),
        Ok(located) => {
            let folder = located.folders.data_path(Path::new(""));
            match std::fs::read_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => (
                    false,
                    format!("cache `{}`: {error}", folder.display()),
                    Some(vmafx_bypass::Reason::Permission.remedy()),
                ),
                _ => (true, format!("cache in `{}`", folder.display()), None),
            }
        }
        Err(refusal) => (false, refusal.to_string(), Some(refusal.reason.remedy())),
    };
    MountRow {
        path: JsonPath::new(Some(&mount.point)),
        source: mount.source.to_string_lossy().into_owned(),
        dev: mount.dev.to_string(),
        read_only: mount.read_only,
        pass,
        detail,
        remedy,
        point: mount.point.clone(),
    }
}

fn write_text(out: &mut impl Write, document: &Document) -> io::Result<()> {
    for check in &document.checks {
        let mark = match (check.pass, check.needed) {
            (true, _) => "ok",
            (false, true) => "NO",
            (false, false) => "-",
        };
        writeln!(
            out,
            "{mark:<3} {:<18} {}",
            check.name,
            escape(check.detail.as_ref())
        )?;
        if let Some(remedy) = &check.remedy {
            writeln!(out, "    {:<18} -> {remedy}", "")?;
        }
    }
    if document.mounts.is_empty() {
        writeln!(out, "-   {:<18} none found", "rclone mounts")?;
    }
    for mount in &document.mounts {
        let mark = if mount.pass { "ok" } else { "-" };
        let point = escape(mount.point.as_os_str());
        let detail = escape(mount.detail.as_ref());
        writeln!(
            out,
            "{mark:<3} {point} ({}): {detail}",
            escape(mount.source.as_ref())
        )?;
        if let Some(remedy) = mount.remedy {
            writeln!(out, "    {:<18} -> {remedy}", "")?;
        }
    }
    let verdict = if document.ok {
        "`run` can work here"
    } else {
        "`run` cannot work here: see NO above"
    };
    writeln!(out, "{verdict}")
}
