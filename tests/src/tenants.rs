//! The tenants of a gateway: a policy, and their keys.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::process::scratch;
use crate::program;

/// The files of a gateway's tenants, in a folder that ends with this.
#[derive(Debug)]
pub struct Tenants {
    folder: PathBuf,
}

impl Drop for Tenants {
    fn drop(&mut self) {
        // Nothing else is in it; a folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Tenants {
    /// The tenants of a policy, who have no keys yet.
    pub fn of(policy: &str) -> Result<Self> {
        let folder = scratch("tenants")?;
        std::fs::create_dir_all(&folder)?;
        let tenants = Self { folder };
        std::fs::write(tenants.policy(), policy)?;
        std::fs::write(tenants.keys(), "")?;
        Ok(tenants)
    }

    /// The file of the policy.
    pub fn policy(&self) -> PathBuf {
        self.folder.join("policy.toml")
    }

    fn keys(&self) -> PathBuf {
        self.folder.join("keys.toml")
    }

    /// A new key of a tenant.
    pub fn key(&self, tenant: &str) -> Result<String> {
        let made = Command::new(program("andon")?)
            .args(["keys", "create", "--tenant", tenant, "--keys"])
            .arg(self.keys())
            .output()?;
        let error = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "no key of {tenant}: {error}");
        Ok(String::from_utf8(made.stdout)?.trim().to_owned())
    }

    /// The flags of a gateway that serves them.
    pub fn flags(&self) -> [String; 4] {
        let (policy, keys) = (self.policy(), self.keys());
        [
            "--policy".to_owned(),
            policy.display().to_string(),
            "--keys".to_owned(),
            keys.display().to_string(),
        ]
    }
}
