//! The nf_tables messages that we send.

use super::attributes::Attributes;
use crate::firewall::expression::Expression;
use crate::firewall::rules::{Chain, LEASE_SET, Lease, Rule, Ruleset, TABLE, Table, TableFamily};

/// Flags of `nlmsghdr`.
pub(super) mod flag {
    pub(crate) const REQUEST: u16 = 0x1;
    pub(crate) const ACK: u16 = 0x4;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const APPEND: u16 = 0x800;
}

/// Message types of the nf_tables subsystem.
pub(super) mod kind {
    const NFTABLES: u16 = 10 << 8;
    pub(crate) const BATCH_BEGIN: u16 = 0x10;
    pub(crate) const BATCH_END: u16 = 0x11;
    pub(crate) const NEW_TABLE: u16 = NFTABLES;
    pub(crate) const GET_TABLE: u16 = NFTABLES | 1;
    pub(crate) const DELETE_TABLE: u16 = NFTABLES | 2;
    pub(crate) const NEW_CHAIN: u16 = NFTABLES | 3;
    pub(crate) const GET_CHAIN: u16 = NFTABLES | 4;
    pub(crate) const NEW_RULE: u16 = NFTABLES | 6;
    pub(crate) const GET_RULE: u16 = NFTABLES | 7;
    pub(crate) const DELETE_RULE: u16 = NFTABLES | 8;
    pub(crate) const NEW_SET: u16 = NFTABLES | 9;
    pub(crate) const GET_SET: u16 = NFTABLES | 0xa;
    pub(crate) const NEW_ELEMENT: u16 = NFTABLES | 0xc;
    pub(crate) const NEW_GENERATION: u16 = NFTABLES | 0xf;
    /// Unlike delete, it is content if the element is gone already.
    pub(crate) const DESTROY_ELEMENT: u16 = NFTABLES | 0x1e;
}

/// Nobody else may change the table while we live, and it stays when we are gone (closed: nobody renews the lease).
pub(crate) const OWNED_AND_PERSISTENT: u32 = 0x2 | 0x4;

const SET_WITH_TIMEOUTS: u32 = 0x10;
/// How nft shows the keys of the sets: `ipv4`, `ipv6`; and a mark.
const KEY_TYPE_PROTOCOL_FAMILY: u32 = 2;
const KEY_TYPE_MARK: u32 = 19;
const REGISTER: u32 = 1;
const ATTRIBUTE_LIST_ELEMENT: u16 = 1;

/// Messages that succeed or fail as one.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(super) messages: Vec<Message>,
}

/// One message without its header's sequence number.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) family: u8,
    pub(super) payload: Vec<u8>,
    /// For the error message, should the kernel refuse it.
    pub(super) what: String,
}

impl Batch {
    /// Puts `ruleset` in the place of whatever was there under our name, lease included.
    pub(crate) fn replace(ruleset: &Ruleset, table_flags: u32, lease_milliseconds: Option<u64>) -> Self {
        let mut batch = Self::default();
        for table in &ruleset.tables {
            // Add, delete, add: deleting a table that is not there would fail the batch.
            batch.table(kind::NEW_TABLE, table.family, table_flags);
            batch.table(kind::DELETE_TABLE, table.family, table_flags);
            batch.table(kind::NEW_TABLE, table.family, table_flags);
            batch.contents(table);
        }
        if lease_milliseconds.is_some() {
            batch.lease_elements(kind::NEW_ELEMENT, ruleset, lease_milliseconds);
        }
        batch
    }

    /// Puts `ruleset`'s rules in the place of those in the same chains. No packet meets a chain without its rules, as it
    /// may while chains are replaced (a new chain hooks in, and drops, before its rules count). The lease is not touched.
    pub(crate) fn exchange_rules(ruleset: &Ruleset) -> Self {
        let mut batch = Self::default();
        for table in &ruleset.tables {
            // Without a chain it means all rules of the table.
            let payload = Attributes::default().text(1, TABLE);
            batch.push(kind::DELETE_RULE, 0, table.family, payload, "the old rules".to_owned());
            batch.rules(table);
        }
        batch
    }

    /// Ends the lease of all tables, and begins a new one if it is still to last. Adding an element that is there does
    /// *not* refresh it, hence the destruction first; nobody sees the moment in between.
    pub(crate) fn lease(ruleset: &Ruleset, milliseconds: Option<u64>) -> Self {
        let mut batch = Self::default();
        batch.lease_elements(kind::DESTROY_ELEMENT, ruleset, None);
        if milliseconds.is_some() {
            batch.lease_elements(kind::NEW_ELEMENT, ruleset, milliseconds);
        }
        batch
    }

    fn table(&mut self, kind: u16, family: TableFamily, table_flags: u32) {
        let payload = Attributes::default().text(1, TABLE).u32(2, table_flags);
        self.push(kind, 0, family, payload, "table".to_owned());
    }

    fn contents(&mut self, table: &Table) {
        let (key_type, key_length) = match table.lease {
            Lease::Families(_) => (KEY_TYPE_PROTOCOL_FAMILY, size_of::<u8>()),
            Lease::Mark(_) => (KEY_TYPE_MARK, size_of::<u32>()),
        };
        let payload = Attributes::default()
            .text(1, TABLE)
            .text(2, LEASE_SET)
            .u32(3, SET_WITH_TIMEOUTS)
            .u32(4, key_type)
            .u32(5, key_length as u32)
            // The set's number within the batch: it is the only one of its table.
            .u32(10, 1);
        self.push(kind::NEW_SET, flag::CREATE, table.family, payload, format!("set {LEASE_SET}"));
        for chain in &table.chains {
            self.push(
                kind::NEW_CHAIN,
                flag::CREATE,
                table.family,
                encode_chain(chain),
                format!("chain {}", chain.name),
            );
        }
        self.rules(table);
    }

    fn rules(&mut self, table: &Table) {
        for chain in &table.chains {
            for rule in &chain.rules {
                let what = format!("rule \"{}\" of chain {}", rule.comment, chain.name);
                self.push(kind::NEW_RULE, flag::CREATE | flag::APPEND, table.family, encode_rule(chain, rule), what);
            }
        }
    }

    fn lease_elements(&mut self, kind: u16, ruleset: &Ruleset, milliseconds: Option<u64>) {
        for table in &ruleset.tables {
            let keys = match &table.lease {
                Lease::Families(families) => families.iter().map(|family| vec![*family]).collect(),
                Lease::Mark(mark) => vec![mark.to_ne_bytes().to_vec()],
            };
            let mut elements = Attributes::default();
            for key in keys {
                let mut element = Attributes::default().nested(1, &Attributes::default().bytes(1, &key));
                if let Some(milliseconds) = milliseconds {
                    element = element.u64(4, milliseconds);
                }
                elements = elements.nested(ATTRIBUTE_LIST_ELEMENT, &element);
            }
            let payload = Attributes::default().text(1, TABLE).text(2, LEASE_SET).nested(3, &elements);
            let flags = if kind == kind::NEW_ELEMENT { flag::CREATE } else { 0 };
            self.push(kind, flags, table.family, payload, "the lease".to_owned());
        }
    }

    fn push(&mut self, kind: u16, flags: u16, family: TableFamily, payload: Attributes, what: String) {
        let flags = flags | flag::REQUEST | flag::ACK;
        self.messages.push(Message { kind, flags, family: family as u8, payload: payload.into_bytes(), what });
    }
}

fn encode_chain(chain: &Chain) -> Attributes {
    let mut hook = Attributes::default().u32(1, chain.hook).u32(2, chain.priority.cast_unsigned());
    if let Some(device) = &chain.device {
        hook = hook.text(3, device);
    }
    Attributes::default()
        .text(1, TABLE)
        .text(3, &chain.name)
        .nested(4, &hook)
        .u32(5, u32::from(chain.accept_by_default))
        .text(7, chain.kind)
}

fn encode_rule(chain: &Chain, rule: &Rule) -> Attributes {
    let mut expressions = Attributes::default();
    for expression in &rule.expressions {
        let (name, data) = encode_expression(expression);
        let encoded = Attributes::default().text(1, name).nested(2, &data);
        expressions = expressions.nested(ATTRIBUTE_LIST_ELEMENT, &encoded);
    }
    Attributes::default()
        .text(1, TABLE)
        .text(2, &chain.name)
        .nested(4, &expressions)
        .bytes(7, &encode_comment(&rule.comment))
}

/// nft's own convention for user data: type 0 is a comment, ended by a zero byte.
fn encode_comment(comment: &str) -> Vec<u8> {
    let text = &comment.as_bytes()[..comment.len().min(127)];
    let mut data = vec![0, text.len() as u8 + 1];
    data.extend_from_slice(text);
    data.push(0);
    data
}

fn encode_expression(expression: &Expression) -> (&'static str, Attributes) {
    let empty = Attributes::default;
    let value = |bytes: &[u8]| Attributes::default().bytes(1, bytes);
    match expression {
        Expression::Meta(key) => ("meta", empty().u32(1, REGISTER).u32(2, *key as u32)),
        Expression::SetMark => {
            ("meta", empty().u32(2, crate::firewall::expression::Meta::Mark as u32).u32(3, REGISTER))
        }
        Expression::Ct(key) => ("ct", empty().u32(1, REGISTER).u32(2, *key as u32)),
        Expression::SetCtMark => ("ct", empty().u32(2, crate::firewall::expression::Ct::Mark as u32).u32(4, REGISTER)),
        Expression::Payload { base, offset, length } => {
            ("payload", empty().u32(1, REGISTER).u32(2, *base as u32).u32(3, *offset).u32(4, *length))
        }
        Expression::SocketCgroup { level } => {
            const CGROUP_V2: u32 = 3;
            ("socket", empty().u32(1, CGROUP_V2).u32(2, REGISTER).u32(3, *level))
        }
        Expression::Mask(mask) => (
            "bitwise",
            empty()
                .u32(1, REGISTER)
                .u32(2, REGISTER)
                .u32(3, mask.len() as u32)
                .nested(4, &value(mask))
                .nested(5, &value(&vec![0; mask.len()])),
        ),
        Expression::Compare(comparison, data) => {
            ("cmp", empty().u32(1, REGISTER).u32(2, *comparison as u32).nested(3, &value(data)))
        }
        Expression::Constant(data) => ("immediate", empty().u32(1, REGISTER).nested(2, &value(data))),
        Expression::Lookup { set } => ("lookup", empty().text(1, set).u32(2, REGISTER)),
        Expression::Redirect => ("redir", empty().u32(1, REGISTER)),
        Expression::Verdict(verdict) => {
            const VERDICT_REGISTER: u32 = 0;
            let code = empty().u32(1, *verdict as u32);
            ("immediate", empty().u32(1, VERDICT_REGISTER).nested(2, &empty().nested(2, &code)))
        }
    }
}
