//! Breaks a fleet and reports what callers noticed. The tests assert the outcomes
//! with wide bounds; this measures.

mod attacks;
mod faults;
mod honest;
mod starvation;

use anyhow::Result;
use clap::Parser;

/// What is done to the fleets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Processes that die, freeze, restart and drain, and too much load.
    Faults,
    /// Callers that mean harm, each beside an honest tenant.
    Attacks,
    /// Everything.
    All,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// What is done
    #[arg(long, value_enum, default_value = "all")]
    part: Part,
}

#[tokio::main]
async fn main() -> Result<()> {
    let part = Arguments::parse().part;
    if part != Part::Attacks {
        faults::report().await?;
    }
    if part != Part::Faults {
        attacks::report().await?;
    }
    Ok(())
}
