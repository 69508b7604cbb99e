//! `--metrics`, of `run` and `mount`.

use std::net::SocketAddr;

use clap::Args;

#[derive(Debug, Clone, Args)]
pub struct MetricsArgs {
    /// Serve counts for Prometheus at this address over HTTP, with /healthz and
    /// /readyz; without an address, at 127.0.0.1:9779.
    #[arg(long, num_args = 0..=1, default_missing_value = "127.0.0.1:9779",
          value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics: Option<SocketAddr>,
}

fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    let no_address = "not an address with a port: write it as 127.0.0.1:9779 or [::1]:9779";
    text.parse().map_err(|_| no_address)
}
