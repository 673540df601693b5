//! A trie of byte strings with an id each, in which the longest prefix of a word is found with one
//! array access per byte: a double array (Aoe 1989), indexed by exclusive or.

/// The node of the empty string.
pub(super) const ROOT: u32 = 0;
/// A node that does not exist.
const NO_NODE: u32 = u32::MAX;

/// The parent of an unused slot.
const FREE: u32 = u32::MAX;
/// The parent of the root.
const NO_PARENT: u32 = u32::MAX - 1;
/// The id of a node where no string ends; a vocabulary with this id is not supported.
const NO_ID: u32 = u32::MAX;
/// The children of a node are in one block of this many slots: their bytes change the low eight
/// bits of its base.
const BLOCK: usize = 256;
/// How many of the last slots are searched for free ones before the array grows. More would save
/// little memory and make the loading of a large vocabulary slow.
const SEARCHED: usize = 4 * BLOCK;

#[derive(Clone, Copy)]
struct Node {
    /// The child by a byte is at `base ^ byte`, if the parent of that slot is this node.
    base: u32,
    parent: u32,
    id: u32,
}

const EMPTY: Node = Node {
    base: 0,
    parent: FREE,
    id: NO_ID,
};

pub(super) struct Trie {
    nodes: Vec<Node>,
}

/// Strings that share their first `depth` bytes, which lead to `node`.
struct Branch<'a> {
    node: u32,
    depth: usize,
    strings: &'a [(&'a [u8], u32)],
}

impl Trie {
    /// None where there are too many strings, or one has the reserved id.
    pub(super) fn new(vocabulary: &[(&[u8], u32)]) -> Option<Self> {
        if vocabulary.iter().any(|(_, id)| *id == NO_ID) {
            return None;
        }
        let mut strings = vocabulary.to_vec();
        strings.sort_unstable();
        let mut trie = Self {
            nodes: vec![EMPTY; BLOCK],
        };
        trie.nodes.first_mut()?.parent = NO_PARENT;
        let mut free = 0;
        let mut branches = vec![Branch {
            node: ROOT,
            depth: 0,
            strings: &strings,
        }];
        while let Some(branch) = branches.pop() {
            let longer = trie.set_id(&branch)?;
            let children: Vec<_> = longer
                .chunk_by(|one, two| one.0.get(branch.depth) == two.0.get(branch.depth))
                .filter_map(|same| Some((*same.first()?.0.get(branch.depth)?, same)))
                .collect();
            let bytes: Vec<u8> = children.iter().map(|(byte, _)| *byte).collect();
            let base = trie.find_base(&bytes, &mut free)?;
            trie.nodes.get_mut(branch.node as usize)?.base = base;
            for (byte, strings) in children {
                let node = base ^ u32::from(byte);
                trie.nodes.get_mut(node as usize)?.parent = branch.node;
                branches.push(Branch {
                    node,
                    depth: branch.depth + 1,
                    strings,
                });
            }
        }
        Some(trie)
    }

    /// Sets the id of the string that ends at the branch's node, which is the first in order, and
    /// returns the others.
    fn set_id<'a>(&mut self, branch: &Branch<'a>) -> Option<&'a [(&'a [u8], u32)]> {
        match branch.strings.split_first() {
            Some(((string, id), longer)) if string.len() == branch.depth => {
                self.nodes.get_mut(branch.node as usize)?.id = *id;
                Some(longer)
            }
            _ => Some(branch.strings),
        }
    }

    /// A base with a free slot for each of these bytes. No slot below `free` is free.
    fn find_base(&mut self, bytes: &[u8], free: &mut usize) -> Option<u32> {
        let Some((first, others)) = bytes.split_first() else {
            return Some(0);
        };
        while !self.is_free(*free) && *free < self.nodes.len() {
            *free += 1;
        }
        let from = if others.is_empty() {
            *free
        } else {
            (*free).max(self.nodes.len().saturating_sub(SEARCHED))
        };
        for slot in from..self.nodes.len() {
            let base = slot ^ usize::from(*first);
            let fits = |byte: &u8| self.is_free(base ^ usize::from(*byte));
            if self.is_free(slot) && others.iter().all(fits) {
                return u32::try_from(base).ok();
            }
        }
        let base = self.nodes.len();
        self.nodes.resize(base + BLOCK, EMPTY);
        u32::try_from(base)
            .ok()
            .filter(|base| *base < NO_PARENT - BLOCK as u32)
    }

    fn is_free(&self, slot: usize) -> bool {
        let node = self.nodes.get(slot);
        node.is_some_and(|node| node.parent == FREE)
    }

    /// The node that these bytes lead to from the root, or [`NO_NODE`].
    pub(super) fn node(&self, bytes: &[u8]) -> u32 {
        let mut node = ROOT;
        for byte in bytes {
            let Some(child) = self.child(node, *byte) else {
                return NO_NODE;
            };
            node = child;
        }
        node
    }

    /// The longest string that is a prefix of `bytes`, from `node` on: its id and its length.
    #[inline]
    pub(super) fn longest(
        &self,
        mut node: u32,
        bytes: impl Iterator<Item = u8>,
    ) -> Option<(u32, usize)> {
        let mut base = self.nodes.get(node as usize)?.base;
        let mut longest = None;
        for (passed, byte) in bytes.enumerate() {
            let next = base ^ u32::from(byte);
            match self.nodes.get(next as usize) {
                Some(child) if child.parent == node => {
                    node = next;
                    base = child.base;
                    if child.id != NO_ID {
                        longest = Some((child.id, passed + 1));
                    }
                }
                _ => break,
            }
        }
        longest
    }

    fn child(&self, node: u32, byte: u8) -> Option<u32> {
        let child = self.nodes.get(node as usize)?.base ^ u32::from(byte);
        (self.nodes.get(child as usize)?.parent == node).then_some(child)
    }
}
