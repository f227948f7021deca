//! Approvals: a person's approval or denial of one operation that a program requested.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::hex;
use crate::name::VmName;

/// How long an approval can be given and used, from the moment it was requested.
pub const APPROVAL_LIFETIME: Duration = Duration::from_secs(120);
/// How many approvals one caller may wait for at a time.
pub const APPROVALS_PENDING_MAX: usize = 32;

/// The operation that an approval is requested for. All of it but the VM's name and what the client calls itself is what an approval is bound to.
#[derive(Debug, Clone, PartialEq)]
pub struct ApprovalRequest {
    /// The operation, for example `vm_delete`.
    pub tool: String,
    /// The id of the VM it is done to: its name may belong to another one tomorrow.
    pub vm_id: String,
    /// The name it has now, for people.
    pub vm_name: VmName,
    /// Who really asks, as in the audit log: `uid:1000`, `token:ci`.
    pub actor: String,
    /// The client's own name for itself. A claim.
    pub agent: Option<String>,
    /// The operation's arguments, as they came. What is called `approval_id` at the top does not count, nor what is `null` or
    /// `false` there: it is the same as left out.
    pub arguments: Value,
}

impl ApprovalRequest {
    /// SHA-256 of the arguments in one spelling, whatever order they came in, in hexadecimal.
    #[must_use]
    pub fn digest(&self) -> String {
        let counted = match &self.arguments {
            Value::Object(fields) => {
                let counts = |key: &str, value: &Value| {
                    // An omitted value and its default are the same.
                    key != "approval_id" && !value.is_null() && *value != Value::Bool(false)
                };
                let counted = fields.iter().filter(|(key, value)| counts(key, value));
                counted.map(|(k, v)| (k.clone(), v.clone())).collect()
            }
            other => Map::from_iter([(String::new(), other.clone())]),
        };
        hex::encode(&Sha256::digest(sorted(&Value::Object(counted)).to_string()))
    }
}

/// The same value, the members of every object in order of their names.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().map(|(key, value)| (key.clone(), sorted(value))).collect();
            fields.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(fields.into_iter().collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

/// State of an approval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ApprovalState {
    /// Pending: no person has decided yet.
    Pending,
    /// Approved: the operation can be started once.
    Approved,
    /// Denied.
    Denied,
    /// Used: the operation was started with it.
    Used,
    /// Expired before it was used or decided.
    Expired,
}

impl ApprovalState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Pending, Self::Approved, Self::Denied, Self::Used, Self::Expired];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Denied => "denied",
            Self::Used => "used",
            Self::Expired => "expired",
        }
    }
}

/// An approval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Approval {
    /// Its id: `apr_` and 16 hexadecimal digits.
    pub id: String,
    /// The operation.
    pub tool: String,
    /// The id of the VM that the operation changes.
    pub vm_id: String,
    /// The name of that VM at the time of the request.
    pub vm_name: VmName,
    /// The authenticated caller: `uid:1000`, `token:ci`.
    pub actor: String,
    /// The name that the client gave itself. Not verified.
    pub agent: Option<String>,
    /// The operation's arguments, redacted as in the audit log.
    pub arguments: Value,
    /// Its state.
    pub state: ApprovalState,
    /// When it was requested.
    pub created_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
    /// When a person last decided.
    pub decided_at: Option<Timestamp>,
    /// The person who decided.
    pub decided_by: Option<String>,
}

/// A list of approvals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ApprovalList {
    /// Pending ones first, then the newest first.
    pub approvals: Vec<Approval>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn digest(arguments: Value) -> String {
        let (vm_name, tool) = ("web".parse().unwrap(), "vm_delete".into());
        ApprovalRequest { tool, vm_id: "1".into(), vm_name, actor: "uid:1".into(), agent: None, arguments }.digest()
    }

    #[test]
    fn the_order_of_arguments_does_not_matter_and_everything_else_does() {
        let same = digest(json!({ "name": "web", "deep": { "a": 1, "b": [1, 2] } }));
        assert_eq!(digest(json!({ "deep": { "b": [1, 2], "a": 1 }, "name": "web", "approval_id": "apr_1" })), same);
        let left_out = json!({ "name": "web", "deep": { "a": 1, "b": [1, 2] }, "force": null, "overwrite": false });
        assert_eq!(digest(left_out), same, "what is said by leaving it out");
        for other in [
            json!({ "name": "web", "deep": { "a": 1, "b": [2, 1] } }),
            json!({ "name": "web", "deep": { "a": "1", "b": [1, 2] } }),
            json!({ "name": "web", "deep": { "a": 1, "b": [1, 2], "approval_id": "x" } }),
            json!({ "name": "web", "deep": { "a": 1, "b": [1, 2] }, "force": true }),
            json!({ "name": "web", "deep": { "a": 1, "b": [1, 2], "force": null } }),
            json!([{ "name": "web" }]),
            Value::Null,
        ] {
            assert_ne!(digest(other.clone()), same, "{other}");
        }
    }

    proptest! {
        #[test]
        fn different_arguments_have_different_digests(a in any::<String>(), b in any::<String>(), c in any::<String>()) {
            let pair = |x: &str, y: &str| digest(json!({ "x": x, "y": y }));
            prop_assert_eq!(pair(&a, &b) == pair(&a, &c), b == c);
            let one = format!("{a}\",\"y\":\"{b}");
            prop_assert_ne!(pair(&a, &b), digest(json!({ "x": one })));
        }
    }
}
