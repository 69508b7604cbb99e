//! `--metrics`: what `run` and `mount` count, over HTTP.

#[cfg(feature = "ebpf")]
mod clips;
mod family;
#[cfg(feature = "mount")]
mod mount;
mod page;
mod process;
#[cfg(feature = "ebpf")]
mod run;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::registry::Registry;
use vmafx_bypass::metrics::{Health, Server};
use vmafx_bypass::privileges::Capabilities;

use crate::exit::{Coded, Exit};
use crate::output::Notes;
#[cfg(feature = "mount")]
pub use mount::Mount;
#[cfg(feature = "ebpf")]
pub use run::Run;

/// Counts that are served as long as this is kept; nowhere, if that was not asked for.
pub struct Serving<T> {
    counted: Arc<T>,
    _server: Option<Server>,
}

/// Serves `counted` at an address, if there is one; before there is anything to
/// count, so that nothing has been done where it cannot listen there.
pub fn serve<T>(
    address: Option<SocketAddr>,
    counted: T,
    keep: Capabilities,
    notes: &Notes,
) -> Result<Serving<T>>
where
    T: Collector + Health,
{
    let counted = Arc::new(counted);
    let start = |address: SocketAddr| {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::clone(&counted)));
        let health: Arc<dyn Health> = counted.clone();
        Server::start(address, registry, health, keep).map_err(|e| {
            let what = format!(
                "metrics: cannot listen at {address}: {e}; name another address by --metrics"
            );
            Coded::error(Exit::Environment, what)
        })
    };
    let server = address.map(start).transpose()?;
    if let Some(server) = &server {
        let address = server.address();
        notes.note(format_args!("metrics at http://{address}/metrics"));
        if !address.ip().is_loopback() {
            notes.note(format_args!(
                "warning: whoever reaches {address} sees how many clips are open and how they \
                 are read, though no names: keep it on a network of your own"
            ));
        }
    }
    Ok(Serving {
        counted,
        _server: server,
    })
}

impl<T> Serving<T> {
    /// What is counted.
    pub fn counted(&self) -> &T {
        &self.counted
    }
}

#[cfg(test)]
mod tests;
