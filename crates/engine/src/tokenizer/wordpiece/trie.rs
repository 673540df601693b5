//! A set of byte strings with an id each, in which the longest beginning of a word is found by
//! one array access per byte: a double array (Aoe 1989), its places by exclusive or.

/// The place of the empty string.
pub(super) const ROOT: u32 = 0;
/// A place from which nothing can be reached.
const NOWHERE: u32 = u32::MAX;

/// The parent of a place that nothing took yet.
const FREE: u32 = u32::MAX;
/// The parent of the root.
const NONE: u32 = u32::MAX - 1;
/// The id where no string ends; a vocabulary that has it is not taken.
const NO_ID: u32 = u32::MAX;
/// The children of a node lie in one block of this many places: their bytes change the low eight
/// bits of its base.
const BLOCK: usize = 256;
/// How many of the last places are looked through for room before the array grows. More would
/// save little memory and make the loading of a large vocabulary slow.
const SEARCHED: usize = 4 * BLOCK;

#[derive(Clone, Copy)]
struct Node {
    /// The child by a byte is at `base ^ byte`, if that has this node as its parent.
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

/// Strings that share their first `depth` bytes, which lead to `place`.
struct Branch<'a> {
    place: u32,
    depth: usize,
    strings: &'a [(&'a [u8], u32)],
}

impl Trie {
    /// None where there are too many strings, or the id that means none.
    pub(super) fn new(vocabulary: &[(&[u8], u32)]) -> Option<Self> {
        if vocabulary.iter().any(|(_, id)| *id == NO_ID) {
            return None;
        }
        let mut strings = vocabulary.to_vec();
        strings.sort_unstable();
        let mut trie = Self {
            nodes: vec![EMPTY; BLOCK],
        };
        trie.nodes.first_mut()?.parent = NONE;
        let mut free = 0;
        let mut branches = vec![Branch {
            place: ROOT,
            depth: 0,
            strings: &strings,
        }];
        while let Some(branch) = branches.pop() {
            let longer = trie.end(&branch)?;
            let children: Vec<_> = longer
                .chunk_by(|one, two| one.0.get(branch.depth) == two.0.get(branch.depth))
                .filter_map(|same| Some((*same.first()?.0.get(branch.depth)?, same)))
                .collect();
            let bytes: Vec<u8> = children.iter().map(|(byte, _)| *byte).collect();
            let base = trie.room(&bytes, &mut free)?;
            trie.nodes.get_mut(branch.place as usize)?.base = base;
            for (byte, strings) in children {
                let place = base ^ u32::from(byte);
                trie.nodes.get_mut(place as usize)?.parent = branch.place;
                branches.push(Branch {
                    place,
                    depth: branch.depth + 1,
                    strings,
                });
            }
        }
        Some(trie)
    }

    /// Notes the id of the string that ends where this branch begins, and returns the others.
    /// Sorted, it is the first.
    fn end<'a>(&mut self, branch: &Branch<'a>) -> Option<&'a [(&'a [u8], u32)]> {
        match branch.strings.split_first() {
            Some(((string, id), longer)) if string.len() == branch.depth => {
                self.nodes.get_mut(branch.place as usize)?.id = *id;
                Some(longer)
            }
            _ => Some(branch.strings),
        }
    }

    /// A base that has a free place for each of these bytes. `free` is a place below which there
    /// is none.
    fn room(&mut self, bytes: &[u8], free: &mut usize) -> Option<u32> {
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
        for place in from..self.nodes.len() {
            let base = place ^ usize::from(*first);
            let fits = |byte: &u8| self.is_free(base ^ usize::from(*byte));
            if self.is_free(place) && others.iter().all(fits) {
                return u32::try_from(base).ok();
            }
        }
        let base = self.nodes.len();
        self.nodes.resize(base + BLOCK, EMPTY);
        u32::try_from(base)
            .ok()
            .filter(|base| *base < NONE - BLOCK as u32)
    }

    fn is_free(&self, place: usize) -> bool {
        let node = self.nodes.get(place);
        node.is_some_and(|node| node.parent == FREE)
    }

    /// The place that these bytes lead to from the root, or [`NOWHERE`].
    pub(super) fn place(&self, bytes: &[u8]) -> u32 {
        let mut place = ROOT;
        for byte in bytes {
            let Some((next, _)) = self.step(place, *byte) else {
                return NOWHERE;
            };
            place = next;
        }
        place
    }

    /// The longest string that `bytes` begin with, counted from `place`: its id, and how many of
    /// the bytes it takes.
    #[inline]
    pub(super) fn longest(
        &self,
        mut place: u32,
        bytes: impl Iterator<Item = u8>,
    ) -> Option<(u32, usize)> {
        let mut base = self.nodes.get(place as usize)?.base;
        let mut found = None;
        for (passed, byte) in bytes.enumerate() {
            let next = base ^ u32::from(byte);
            match self.nodes.get(next as usize) {
                Some(node) if node.parent == place => {
                    place = next;
                    base = node.base;
                    if node.id != NO_ID {
                        found = Some((node.id, passed + 1));
                    }
                }
                _ => break,
            }
        }
        found
    }

    fn step(&self, place: u32, byte: u8) -> Option<(u32, Node)> {
        let next = self.nodes.get(place as usize)?.base ^ u32::from(byte);
        let node = self.nodes.get(next as usize)?;
        (node.parent == place).then_some((next, *node))
    }
}
