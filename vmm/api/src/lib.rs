//! Requests and answers of the core API, one file per noun. `--json`, the REST body and the MCP structured result are
//! these types, so they are a written promise: fields are added, never renamed.

pub mod approval;
pub mod audit;
pub mod caller;
pub mod copy;
pub mod egress;
pub mod event;
pub mod exec;
pub mod forward;
pub mod host_limits;
pub mod job;
pub mod lease;
pub mod limit_hit;
pub mod limits;
pub mod log;
pub mod net;
pub mod net_limits;
pub mod pool;
pub mod query;
pub mod receipt;
pub mod rule_change;
pub mod secret;
pub mod secret_env;
pub mod snapshot;
pub mod spawn;
pub mod start_stage;
pub mod template;
pub mod token;
pub mod vm;
pub mod vm_info;
pub mod vm_ref;
pub mod webhook;
pub mod webhook_message;
pub mod webhook_secret;

pub mod error;
pub mod hex;
pub mod machine;
pub mod moment;
pub mod name;
pub mod operation;
pub mod redact;
pub mod restart;
pub mod sanitize;
pub mod state;

pub use approval::*;
pub use audit::*;
pub use caller::*;
pub use copy::*;
pub use egress::{
    AllowEntry, DomainName, EGRESS_RULES_MAX, EgressRule, PresetInfo, PresetList, PresetName, PresetRules, embedded_v4,
    is_global,
};
pub use event::*;
pub use exec::*;
pub use forward::*;
pub use host_limits::HostLimits;
pub use job::*;
pub use lease::*;
pub use limit_hit::{LIMITS_SHOWN, LimitHit, LimitKind};
pub use limits::*;
pub use log::*;
pub use net::*;
pub use net_limits::{NetLimitKey, NetLimits};
pub use pool::*;
pub use query::*;
pub use receipt::*;
pub use rule_change::*;
pub use secret::*;
pub use secret_env::*;
pub use snapshot::*;
pub use spawn::*;
pub use start_stage::*;
pub use template::*;
pub use token::*;
pub use vm::*;
pub use vm_info::*;
pub use vm_ref::*;
pub use webhook::*;
pub use webhook_message::*;
pub use webhook_secret::*;
