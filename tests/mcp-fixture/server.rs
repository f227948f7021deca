//! What the protocol asks of the fixture: lists, calls, reading, listening; the same two eras as nido's own server.

#![allow(deprecated, reason = "the suite for 2025-11-25 wants logging, which the next revision has given up")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::request::Parts;
use nido_mcp::Principal;
use nido_mcp::http::Agents;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CompleteRequestParams, CompleteResult, CompletionInfo, ErrorData,
    GetPromptRequestParams, GetPromptResponse, Implementation, ListPromptsResult, ListResourceTemplatesResult,
    ListResourcesResult, ListToolsResult, LoggingLevel, PaginatedRequestParams, ProtocolVersion,
    ReadResourceRequestParams, ReadResourceResponse, ServerCapabilities, ServerConfig, SetLevelRequestMethod,
    SetLevelRequestParams, SubscribeRequestParams, SubscriptionFilter, Tool, UnsubscribeRequestParams,
};
use rmcp::service::{RequestContext, SubscriptionContext};
use rmcp::{RoleServer, ServerHandler};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::asks::States;
use crate::{prompts, reads, tools};

/// How many changes a slow listener may be behind.
const CHANGES_BUFFERED_MAX: usize = 16;

/// The change that listeners are notified of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    Tools,
    Prompts,
}

/// One server: what its sessions share.
pub struct Fixture {
    pub states: States,
    pub changes: broadcast::Sender<Changed>,
    ending: CancellationToken,
}

impl Fixture {
    pub fn new() -> Self {
        let (states, ending) = (States::default(), CancellationToken::new());
        Self { states, changes: broadcast::channel(CHANGES_BUFFERED_MAX).0, ending }
    }
}

impl Agents for Fixture {
    type Handler = Server;

    fn handler(self: &Arc<Self>) -> Server {
        Server { fixture: Arc::clone(self), level: Arc::new(Mutex::new(LoggingLevel::Info)) }
    }

    fn session_idle(&self) -> Duration {
        nido_mcp::SESSION_IDLE
    }

    fn ending(&self) -> &CancellationToken {
        &self.ending
    }

    async fn finish(&self) {
        self.ending.cancel();
    }
}

/// One session's view of it, or one request's where there are no sessions.
pub struct Server {
    pub fixture: Arc<Fixture>,
    /// The lowest log level that a session requested.
    level: Arc<Mutex<LoggingLevel>>,
}

impl Server {
    /// The lowest log level that this request's client requested, if any.
    pub fn level(&self, context: &RequestContext<RoleServer>) -> Option<LoggingLevel> {
        match is_modern(context) {
            true => context.meta.log_level(),
            false => Some(*self.level.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// Whether there is no session behind a request.
pub fn is_modern(context: &RequestContext<RoleServer>) -> bool {
    context.protocol_version().is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

/// What is recorded as JSON, as the library wants it.
pub fn of_json<T: DeserializeOwned>(value: Value) -> Result<T, ErrorData> {
    serde_json::from_value(value).map_err(|e| ErrorData::internal_error(format!("the fixture is wrong: {e}"), None))
}

/// An answer that is one, and not a question.
pub fn complete<T: DeserializeOwned>(mut value: Value) -> Result<T, ErrorData> {
    value["resultType"] = "complete".into();
    of_json(value)
}

/// nido's authentication has run: a request without it has no principal.
fn guarded(context: &RequestContext<RoleServer>) -> Result<(), ErrorData> {
    let principal = context.extensions.get::<Parts>().and_then(|parts| parts.extensions.get::<Principal>());
    principal.map(drop).ok_or_else(|| ErrorData::invalid_request("the guard did not say who calls", None))
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let can = ServerCapabilities::builder()
            .enable_tools()
            .enable_tool_list_changed()
            .enable_prompts()
            .enable_prompts_list_changed()
            .enable_completions()
            .enable_logging()
            .enable_resources()
            .enable_resources_subscribe()
            .build();
        ServerConfig::new(can).with_server_info(Implementation::new("mcp-fixture", env!("CARGO_PKG_VERSION")))
    }

    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        guarded(&context)?;
        Ok(ListToolsResult::with_all_items(of_json(tools::list())?))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        let list: Vec<Tool> = of_json(tools::list()).ok()?;
        list.into_iter().find(|tool| tool.name == name)
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        guarded(&context)?;
        Box::pin(tools::call(self, request, context)).await
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        guarded(&context)?;
        Ok(ListResourcesResult::with_all_items(of_json(reads::list())?))
    }

    async fn list_resource_templates(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        guarded(&context)?;
        Ok(ListResourceTemplatesResult::with_all_items(of_json(reads::templates())?))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        guarded(&context)?;
        Ok(ReadResourceResponse::Complete(complete(reads::read(&request.uri)?)?))
    }

    async fn list_prompts(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListPromptsResult, ErrorData> {
        guarded(&context)?;
        Ok(ListPromptsResult::with_all_items(of_json(prompts::list())?))
    }

    async fn get_prompt(
        &self,
        request: GetPromptRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<GetPromptResponse, ErrorData> {
        guarded(&context)?;
        prompts::get(self, request, &context)
    }

    async fn complete(
        &self,
        request: CompleteRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CompleteResult, ErrorData> {
        guarded(&context)?;
        let values = ["test value", "another"].map(str::to_owned).into_iter();
        let values = values.filter(|value| value.starts_with(&request.argument.value)).collect();
        Ok(CompleteResult::new(CompletionInfo::new(values).map_err(|e| ErrorData::internal_error(e, None))?))
    }

    async fn set_level(
        &self,
        request: SetLevelRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        guarded(&context)?;
        if is_modern(&context) {
            return Err(ErrorData::method_not_found::<SetLevelRequestMethod>());
        }
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = request.level;
        Ok(())
    }

    async fn subscribe(
        &self,
        request: SubscribeRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        guarded(&context)?;
        reads::read(&request.uri).map(drop)
    }

    async fn unsubscribe(
        &self,
        request: UnsubscribeRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        guarded(&context)?;
        reads::read(&request.uri).map(drop)
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(requested.clone())
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        guarded(context.request_context())?;
        let mut changes = self.fixture.changes.subscribe();
        let wants = context.accepted().clone();
        loop {
            let changed = tokio::select! {
                changed = changes.recv() => changed,
                () = context.cancelled() => return Ok(()),
                () = self.fixture.ending.cancelled() => return Ok(()),
            };
            let sent = match changed {
                Ok(Changed::Tools) if wants.tools_list_changed == Some(true) => {
                    context.sink().notify_tool_list_changed().await
                }
                Ok(Changed::Prompts) if wants.prompts_list_changed == Some(true) => {
                    context.sink().notify_prompt_list_changed().await
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            };
            if sent.is_err() {
                return Ok(());
            }
        }
    }
}
