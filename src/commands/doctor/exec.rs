//! What `exec` needs, judged: pure.

use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::privileges::Capabilities;

use super::container::remedy;
use super::facts::Facts;
use super::judge::Found;

pub fn seccomp_notify(facts: &Facts) -> Found {
    let why = match &facts.exec {
        Ok(assisted) => match &assisted.unassisted {
            None => return Ok("a command was assisted".into()),
            Some(why) => why,
        },
        Err(error) => error,
    };
    let is = |text: &str| why.contains(text);
    let remedy = if facts.opt_in == OptIn::Killed {
        format!("unset {}, or set it to 1", optin::VARIABLE)
    } else if is("forbidden") {
        remedy(facts.place, "seccomp_notify")
            .unwrap_or_else(|| "allow seccomp(2) in the profile that it is started under".into())
    } else if is("another supervisor") {
        "start it outside of what supervises it already".into()
    } else if is("kernel") {
        "run Linux 5.15 or newer, with CONFIG_SECCOMP_FILTER".into()
    } else {
        "mend what it says; until then `exec` runs its command through FUSE".into()
    };
    Err((why.clone(), remedy))
}

pub fn set_uid_programs(facts: &Facts) -> Found {
    match &facts.exec {
        Ok(assisted) if assisted.no_new_privs => Err((
            "no_new_privs is set: they have no effect".into(),
            "start `exec` with CAP_SYS_ADMIN, if its command starts such programs".into(),
        )),
        Ok(_) if facts.no_new_privs => Err((
            "no_new_privs was set before: they have no effect".into(),
            "start it without: `NoNewPrivileges=no`, `allowPrivilegeEscalation: true`".into(),
        )),
        _ => Ok("they have their effect".into()),
    }
}

pub fn ptrace_scope(facts: &Facts) -> Found {
    let traces = facts.capabilities.has(Capabilities::SYS_PTRACE);
    match facts.ptrace_scope {
        None => Ok("no Yama".into()),
        // Its command's processes are its descendants.
        Some(scope) if scope < 2 || (scope == 2 && traces) => {
            Ok(format!("kernel.yama.ptrace_scope={scope}"))
        }
        Some(scope) => Err((
            format!("kernel.yama.ptrace_scope={scope}: every open goes through FUSE"),
            if scope == 2 {
                "as root run `sysctl kernel.yama.ptrace_scope=1`, or add CAP_SYS_PTRACE".into()
            } else {
                "set kernel.yama.ptrace_scope=1 in /etc/sysctl.d and reboot: 3 stays until then"
                    .into()
            },
        )),
    }
}
