//! A gateway that gets no processor time: it must not hold that against its
//! workers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::attacks::ATTACK;
use crate::honest::{Attacked, measure};

/// How long the gateway stands still.
const STOPPED: Duration = Duration::from_secs(5);
/// The quota: a tenth of one processor.
const QUOTA_US: u32 = 10_000;
const PERIOD_US: u32 = 100_000;

/// Both kinds of starvation; the second where a cgroup can be made.
pub async fn report() -> Result<()> {
    let attacked = Attacked::start(&[]).await?;
    measure(
        &attacked,
        "gateway stopped for 5 s",
        async |attacked: &Attacked| {
            attacked.fleet.gateway.signal(libc::SIGSTOP)?;
            tokio::time::sleep(STOPPED).await;
            attacked.fleet.gateway.signal(libc::SIGCONT)?;
            tokio::time::sleep(STOPPED).await;
            Ok(())
        },
    )
    .await?;
    let attacked = Attacked::start(&[]).await?;
    let Some(quota) = Quota::of(attacked.fleet.gateway.id()) else {
        println!(
            "| gateway with a tenth of a processor | no cgroup can be made here | | | | | | | | |"
        );
        return Ok(());
    };
    measure(
        &attacked,
        "gateway with a tenth of a processor",
        async |_: &Attacked| {
            tokio::time::sleep(ATTACK).await;
            Ok(quota)
        },
    )
    .await
}

/// A cgroup with a quota of processor time, gone when it is dropped.
struct Quota {
    folder: PathBuf,
    /// Where its processes go at the end.
    parent: PathBuf,
    process: u32,
}

impl Quota {
    /// Puts a process into one, of version 2 or 1; none where that is not allowed.
    fn of(process: u32) -> Option<Self> {
        let v2 = (
            Path::new("/sys/fs/cgroup"),
            "cpu.max",
            format!("{QUOTA_US} {PERIOD_US}"),
        );
        let v1 = (
            Path::new("/sys/fs/cgroup/cpu"),
            "cpu.cfs_quota_us",
            QUOTA_US.to_string(),
        );
        [v2, v1].into_iter().find_map(|(parent, file, quota)| {
            let folder = parent.join(format!("andon-chaos-{process}"));
            std::fs::create_dir(&folder).ok()?;
            let made = Self {
                folder,
                parent: parent.to_owned(),
                process,
            };
            std::fs::write(made.folder.join(file), quota).ok()?;
            let processes = made.folder.join("cgroup.procs");
            std::fs::write(processes, process.to_string()).ok()?;
            Some(made)
        })
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // A process that has ended is in none.
        let _ = std::fs::write(self.parent.join("cgroup.procs"), self.process.to_string());
        let _ = std::fs::remove_dir(&self.folder);
    }
}
