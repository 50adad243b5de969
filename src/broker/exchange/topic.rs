//! The topic type: keys are words between dots, `*` stands for one word and `#` for any number of them.
//!
//! Patterns are a trie, a node per word. A key is matched by walking the trie with the set of all nodes that the words so
//! far can lead to. No node is in that set twice, so the work is at most words times nodes, however many `#` the
//! patterns have; where RabbitMQ 4.3.5 came to refuse a third `#`, nothing needs to be refused here.
//!
//! # Invariants
//! - T1: words are split at every dot; the empty key has no words, `a..b` has three, and an empty word matches `*`.
//! - T2: a node exists only while a pattern runs through it; a word is interned only while an edge has it.
//!
//! # Why
//! Words are interned and edges are one map by (node, word): a word of the key is hashed once, not once per active
//! node, a word that no pattern has cannot touch the edges at all, and nodes stay small.

use ahash::{AHashMap, AHashSet};
use smallvec::SmallVec;

use super::slots::{Slot, Slots};
use super::target::{Target, TargetSet, Targets};

const ROOT: Slot = 0;

type Word = u32;

/// How a pattern goes on from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    /// `*`
    One,
    /// `#`
    Any,
    Literal(Word),
}

#[derive(Clone, Debug, Default)]
struct Node {
    one: Option<Slot>,
    any: Option<Slot>,
    literal_count: u32,
    /// Of the patterns that end here.
    targets: TargetSet,
}

impl Node {
    fn has_children(&self) -> bool {
        self.one.is_some() || self.any.is_some() || self.literal_count > 0
    }
}

/// A word of patterns and how many edges have it.
#[derive(Clone, Copy, Debug)]
struct Interned {
    word: Word,
    edge_count: u32,
}

/// All patterns of an exchange.
#[derive(Clone, Debug)]
pub struct TopicTrie {
    nodes: Slots<Node>,
    edges: AHashMap<(Slot, Word), Slot>,
    words: AHashMap<Box<[u8]>, Interned>,
    /// Given out in turn; freed numbers come back through `free_words`.
    next_word: Word,
    free_words: Vec<Word>,
}

impl Default for TopicTrie {
    fn default() -> Self {
        let mut nodes = Slots::default();
        let root = nodes.insert(Node::default());
        debug_assert_eq!(root, ROOT);
        Self { nodes, edges: AHashMap::default(), words: AHashMap::default(), next_word: 0, free_words: Vec::new() }
    }
}

/// The words of a key or pattern: none in an empty one, else one more than it has dots.
fn words(key: &[u8]) -> impl Iterator<Item = &[u8]> {
    key.split(|&byte| byte == b'.').skip(usize::from(key.is_empty()))
}

impl TopicTrie {
    pub fn add(&mut self, pattern: &[u8], target: Target) {
        let mut node = ROOT;
        for word in words(pattern) {
            let edge = self.intern_edge(word);
            node = match self.child(node, edge) {
                Some(child) => child,
                None => self.add_child(node, edge, word),
            };
        }
        if let Some(node) = self.nodes.get_mut(node) {
            node.targets.add(target);
        }
    }

    /// Removes one binding of a pattern, and every node that no other pattern needs.
    pub fn remove(&mut self, pattern: &[u8], target: Target) {
        let mut path: SmallVec<[(Slot, Edge, &[u8]); 16]> = SmallVec::new();
        let mut node = ROOT;
        for word in words(pattern) {
            let Some(edge) = self.edge(word) else { return };
            let Some(child) = self.child(node, edge) else {
                return;
            };
            path.push((node, edge, word));
            node = child;
        }
        let Some(last) = self.nodes.get_mut(node) else {
            return;
        };
        last.targets.remove(target);
        while let Some((parent, edge, word)) = path.pop() {
            if self.nodes.get(node).is_some_and(|node| node.has_children() || !node.targets.is_empty()) {
                break;
            }
            self.nodes.remove(node);
            self.remove_edge(parent, edge, word);
            node = parent;
        }
    }

    /// The edge that a pattern's word means, if any pattern has it.
    fn edge(&self, word: &[u8]) -> Option<Edge> {
        match word {
            b"*" => Some(Edge::One),
            b"#" => Some(Edge::Any),
            word => self.words.get(word).map(|interned| Edge::Literal(interned.word)),
        }
    }

    fn intern_edge(&mut self, word: &[u8]) -> Edge {
        self.edge(word).unwrap_or_else(|| {
            let number = self.free_words.pop().unwrap_or_else(|| {
                self.next_word += 1; // an edge each and so far fewer than 2^31 of them, see `Slots`
                self.next_word
            });
            self.words.insert(word.into(), Interned { word: number, edge_count: 0 });
            Edge::Literal(number)
        })
    }

    fn child(&self, node: Slot, edge: Edge) -> Option<Slot> {
        match edge {
            Edge::One => self.nodes.get(node)?.one,
            Edge::Any => self.nodes.get(node)?.any,
            Edge::Literal(word) => self.edges.get(&(node, word)).copied(),
        }
    }

    fn add_child(&mut self, parent: Slot, edge: Edge, word: &[u8]) -> Slot {
        let child = self.nodes.insert(Node::default());
        if let Some(parent) = self.nodes.get_mut(parent) {
            match edge {
                Edge::One => parent.one = Some(child),
                Edge::Any => parent.any = Some(child),
                Edge::Literal(_) => parent.literal_count += 1,
            }
        }
        if let Edge::Literal(number) = edge {
            self.edges.insert((parent, number), child);
            if let Some(interned) = self.words.get_mut(word) {
                interned.edge_count += 1;
            }
        }
        child
    }

    fn remove_edge(&mut self, parent: Slot, edge: Edge, word: &[u8]) {
        if let Some(parent) = self.nodes.get_mut(parent) {
            match edge {
                Edge::One => parent.one = None,
                Edge::Any => parent.any = None,
                Edge::Literal(_) => parent.literal_count -= 1,
            }
        }
        let Edge::Literal(number) = edge else { return };
        self.edges.remove(&(parent, number));
        if let Some(interned) = self.words.get_mut(word) {
            interned.edge_count -= 1;
            if interned.edge_count == 0 {
                self.words.remove(word);
                self.free_words.push(number);
            }
        }
    }

    /// Collects the targets of every pattern that matches the key.
    pub fn collect(&self, key: &[u8], out: &mut Targets) {
        let mut walk = Walk { trie: self, active: SmallVec::new(), loops: SmallVec::new(), opened: Opened::default() };
        walk.active.push(ROOT);
        walk.open_loops(out);
        let mut next = SmallVec::new();
        for word in words(key) {
            if walk.active.is_empty() && walk.loops.is_empty() {
                return;
            }
            walk.step(word, &mut next);
            std::mem::swap(&mut walk.active, &mut next);
            walk.open_loops(out);
        }
        for &node in &walk.active {
            if let Some(node) = self.nodes.get(node) {
                out.extend(&node.targets);
            }
        }
    }
}

/// Nodes; inline while there are few.
type NodeList = SmallVec<[Slot; 16]>;

/// One key on its way through the trie.
struct Walk<'a> {
    trie: &'a TopicTrie,
    /// The nodes that the words so far lead to, apart from those of `#`.
    active: NodeList,
    /// The `#` nodes that the words so far lead to and that go on. Once in, they stay: `#` takes every further word.
    loops: NodeList,
    /// All `#` nodes that the words so far lead to.
    opened: Opened,
}

impl Walk<'_> {
    /// The nodes after one more word. A node has one parent, so `next` gets none twice.
    fn step(&self, word: &[u8], next: &mut NodeList) {
        next.clear();
        let literal = self.trie.words.get(word).map(|interned| interned.word);
        for &slot in self.active.iter().chain(&self.loops) {
            let Some(node) = self.trie.nodes.get(slot) else {
                continue;
            };
            if let Some(one) = node.one {
                next.push(one);
            }
            if let Some(word) = literal
                && node.literal_count > 0
                && let Some(&child) = self.trie.edges.get(&(slot, word))
            {
                next.push(child);
            }
        }
    }

    /// Follows `#` from every active node at no word, and again from there (`#.#`).
    ///
    /// Whatever ends in a `#` that is reached matches, whichever words are still to come.
    fn open_loops(&mut self, out: &mut Targets) {
        for place in 0..self.active.len() {
            let mut at = self.active[place];
            while let Some(any) = self.trie.nodes.get(at).and_then(|node| node.any)
                && self.opened.insert(any)
            {
                if let Some(node) = self.trie.nodes.get(any) {
                    out.extend(&node.targets);
                    if node.has_children() {
                        self.loops.push(any);
                    }
                }
                at = any;
            }
        }
    }
}

/// A set of `#` nodes: a list while they are few. The hash set is only made when it is needed, as its seed costs more than
/// the list does.
#[derive(Default)]
struct Opened {
    few: SmallVec<[Slot; 16]>,
    many: Option<AHashSet<Slot>>,
}

impl Opened {
    /// Whether the node is new.
    fn insert(&mut self, node: Slot) -> bool {
        if let Some(many) = &mut self.many {
            return many.insert(node);
        }
        if self.few.contains(&node) {
            return false;
        }
        if self.few.len() == self.few.inline_size() {
            return self.many.insert(self.few.drain(..).collect()).insert(node);
        }
        self.few.push(node);
        true
    }
}

#[cfg(test)]
mod tests;
