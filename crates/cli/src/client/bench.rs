//! `andon bench`

#[derive(Debug, clap::Args)]
pub struct Bench {}

pub async fn bench(_: Bench) -> anyhow::Result<()> {
    anyhow::bail!("being written")
}
