//! `bench`
use crate::cli::BenchArgs;
use crate::exit::Exit;
use crate::output::Notes;
use crate::signals::Signals;
use anyhow::Result;
/// x
pub fn run(_args: &BenchArgs, _notes: &Notes, _signals: Signals) -> Result<Exit> {
    Ok(Exit::Done)
}
