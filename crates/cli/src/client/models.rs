//! `andon models`

#[derive(Debug, clap::Args)]
pub struct Models {}

pub async fn models(_: Models) -> anyhow::Result<()> {
    anyhow::bail!("being written")
}
