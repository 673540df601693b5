//! The memory that the control group of this process may have: what a container's
//! limit becomes.

use std::fs;
use std::path::Path;

/// Where control groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The groups of this process.
const MEMBERSHIP: &str = "/proc/self/cgroup";
/// Version 1 says "no limit" by a number close to the largest.
const UNLIMITED_MIN: u64 = 1 << 62;

/// The memory limit of this process in bytes, by cgroup v2 or v1; none where
/// there is no limit, or no control group.
pub fn memory_limit() -> Option<u64> {
    let membership = fs::read_to_string(MEMBERSHIP).unwrap_or_default();
    limit_within(Path::new(ROOT), &membership)
}

/// The least limit of the groups that a process belongs to. A container sees its
/// own group at the root or, without a namespace, below it: both are asked, and
/// files that do not exist limit nothing.
fn limit_within(root: &Path, membership: &str) -> Option<u64> {
    let limits = membership.lines().filter_map(|line| {
        // HIERARCHY:CONTROLLERS:PATH, without controllers in version 2.
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let (root, file) = if controllers.is_empty() {
            (root.to_path_buf(), "memory.max")
        } else if controllers.split(',').any(|one| one == "memory") {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            return None;
        };
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        groups
            .filter_map(|group| limit_of(&root.join(group).join(file)))
            .min()
    });
    limits.min()
}

/// The limit in a file; "max" is none.
fn limit_of(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let bytes = text.trim().parse().ok()?;
    (bytes < UNLIMITED_MIN).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with files, removed with its test.
    fn groups(name: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
        let folder = format!("andon-cgroup-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        for (path, text) in files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn both_versions_are_read_and_the_least_limit_of_all_groups_holds() {
        const UNLIMITED: &str = "9223372036854771712\n";
        let memory = "4:cpu:/a\n3:hugetlb,memory:/pods/one\n0::/\n";
        for (name, membership, files, expected) in [
            ("none", "0::/\n", vec![], None),
            ("no-limit", "0::/\n", vec![("memory.max", "max\n")], None),
            (
                "own",
                "0::/\n",
                vec![("memory.max", "536870912\n")],
                Some(512 << 20),
            ),
            (
                "nested",
                "0::/pods/one\n",
                vec![
                    ("pods/one/memory.max", "max\n"),
                    ("pods/memory.max", "1048576\n"),
                    ("memory.max", "2097152\n"),
                ],
                Some(1 << 20),
            ),
            (
                "elsewhere",
                "0::/../host/path\n",
                vec![("memory.max", "1048576\n")],
                Some(1 << 20),
            ),
            (
                "version-1",
                memory,
                vec![("memory/memory.limit_in_bytes", "536870912\n")],
                Some(512 << 20),
            ),
            (
                "version-1-no-limit",
                memory,
                vec![("memory/pods/one/memory.limit_in_bytes", UNLIMITED)],
                None,
            ),
            ("rubbish", "what\n0:\n\n", vec![("memory.max", "1\n")], None),
        ] {
            let root = groups(name, &files);
            assert_eq!(limit_within(&root, membership), expected, "{name}");
            let _ = fs::remove_dir_all(&root);
        }
    }
}
