//! `andon infer`

#[derive(Debug, clap::Args)]
pub struct Infer {}

pub async fn infer(_: Infer) -> anyhow::Result<()> {
    anyhow::bail!("being written")
}
