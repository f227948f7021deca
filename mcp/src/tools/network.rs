//! The network of a VM: shown, and its rules changed.

use futures::future::BoxFuture;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{AllowEntry, VmNetwork};
use serde::Deserialize;
use serde_json::Value;

use super::{Hints, Operation, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const NETWORK: Tool = Tool {
    op: op::VM_NETWORK,
    title: "Network rules",
    about: "Shows rules and refusals of a VM's network; adds (allow) or removes (deny) rules. May ask the user.",
    hints: Hints { idempotent: false, open_world: false },
    takes: schema::arguments::<NetworkArguments>,
    unlisted: &[],
    gives: schema::result::<VmNetwork>,
    parse: |given| Ok(Box::new(Network::parse(given)?)),
};

/// Which rules change.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct NetworkArguments {
    name: VmName,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
}

#[derive(Debug)]
struct Network {
    name: VmName,
    allow: Vec<AllowEntry>,
    deny: Vec<AllowEntry>,
}

impl Network {
    fn parse(given: Value) -> Result<Self> {
        let NetworkArguments { name, allow, deny } = arguments(given)?;
        if !allow.is_empty() && !deny.is_empty() {
            let words = "allow, deny: one call does one of them, so that it is done whole or not at all";
            return Err(Error::new(Code::SpecInvalid, words));
        }
        Ok(Self { name, allow: entries("allow", &allow)?, deny: entries("deny", &deny)? })
    }
}

fn entries(field: &str, texts: &[String]) -> Result<Vec<AllowEntry>> {
    let entry = |(at, text): (usize, &String)| {
        let wrong = |error: Error| Error::new(error.code(), format!("{field}[{at}]: {}", error.message()));
        text.parse::<AllowEntry>().map_err(wrong)
    };
    texts.iter().enumerate().map(entry).collect()
}

impl Operation for Network {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn only_reads(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    fn widens<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<bool>> {
        Box::pin(async {
            if self.allow.is_empty() {
                return Ok(false);
            }
            call.nido().await?.net_widens(call.which(&self.name), self.allow.clone(), &call.grant()).await
        })
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            call.nido().await?.identity(call.which(&self.name))?;
            self.widens(call).await.map(drop)
        })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let (nido, vm) = (call.nido().await?, call.which(&self.name));
            if !self.allow.is_empty() {
                nido.net_allow(vm, self.allow, &call.grant()).await?;
            }
            if !self.deny.is_empty() {
                nido.net_deny(vm, self.deny).await?;
            }
            ToolResult::new(&nido.net_show(vm).await?)
        })
    }
}
